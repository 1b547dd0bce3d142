# pyright: strict
"""Settings of the objective; nothing here imports torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, dataclass_transform, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic.functional_validators import field_validator, model_validator
from pydantic_core import PydanticCustomError

from kd_plugin.settings.aliases import DIVERGENCES

__all__ = [
    "BUILT_IN",
    "DistillConfig",
    "ExchangeMode",
    "Section",
    "SettingsError",
    "TermConfig",
    "registered_names",
    "sorts",
]


class BuiltIn(NamedTuple):
    """What the settings have to know of a divergence, without torch."""

    options: tuple[str, ...] = ()
    """Names of the settings that it takes."""
    sorts: bool = False
    """Whether it sorts both distributions and pairs tokens by place, not by their id; as the definition's `sorts`."""


BUILT_IN = {
    "forward_kl": BuiltIn(),
    "soft_ce": BuiltIn(),
    "reverse_kl": BuiltIn(),
    "jsd": BuiltIn(options=("beta",)),
    "skew_kl": BuiltIn(options=("alpha",)),
    "skew_reverse_kl": BuiltIn(options=("alpha",)),
    "tvd": BuiltIn(),
    "acceptance": BuiltIn(),
    "logit_mse": BuiltIn(),
    "logit_mse_centered": BuiltIn(),
    "cosine": BuiltIn(),
    "uld": BuiltIn(sorts=True),
}
"""Divergences that come with the package; each is a function of this name in `divergences/`."""

registered_names: set[str] = set()
"""Divergences added by `kd_plugin.register_divergence`."""


def sorts(name: str) -> bool:
    """Whether the divergence of this name sorts both distributions; those that were registered do not."""
    return name in BUILT_IN and BUILT_IN[name].sorts


def _known(name: str) -> str:
    names = [*BUILT_IN, *sorted(registered_names)]
    if name not in names:
        near = [DIVERGENCES[name]] if name in DIVERGENCES else difflib.get_close_matches(name, names, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        message = "no such divergence; " + hint + "known: " + ", ".join(names)
        raise PydanticCustomError("unknown_divergence", "{message}", {"message": message})
    return name


DivergenceName = Annotated[str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(BUILT_IN)})]
ExchangeMode = Literal["weight", "logits", "stats"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]


# As pydantic's own metaclass says it, which one derived from it does not inherit
@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class _OneLine(type(BaseModel)):
    """Settings given in Python are refused in one line, as those of a file are."""

    if not TYPE_CHECKING:  # a type checker goes by the fields

        def __call__(cls, *arguments: object, **settings: object) -> BaseModel:
            try:
                return super().__call__(*arguments, **settings)
            except ValidationError as error:
                raise SettingsError(f"{cls.__name__}: {'; '.join(_faults(cls, error))}") from None


def _faults(section: type[BaseModel], error: ValidationError) -> list[str]:
    """One phrase for each key at fault; the alternatives of a key that takes several kinds are joined."""
    wanted: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    phrases: dict[str, str] = {}
    for detail in error.errors():
        # pydantic names the alternatives of a union as if they were keys: literal['auto'], constrained-int
        path = [str(part) for part in detail["loc"] if isinstance(part, int) or part.isidentifier()]
        key, message = ".".join(path), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _section_at(section, path[:-1]).model_fields, 1)
            phrases[key] = f"{key}: unknown setting" + (f"; did you mean {near[0]!r}?" if near else "")
        elif message.startswith("Input should be "):
            wanted.setdefault(key, []).append(message.removeprefix("Input should be "))
            given[key] = detail["input"]
        else:
            phrases[key] = f"{key}: {message}" if key else message
    return [*phrases.values(), *(f"{key}: wants {' or '.join(w)} (got {given[key]!r})" for key, w in wanted.items())]


def _section_at(section: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """What the settings of `section` lead to along `path`: the section in one of them, or in a list."""
    for name in path:
        field = section.model_fields.get(name)  # an item's number, or a kind of a union, is no setting
        section = next(_sections_in(field.annotation), section) if field else section
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


class SettingsError(ValueError):
    """A setting that cannot be as given; the message is one line."""


class Section(BaseModel, metaclass=_OneLine):
    """Base of every section: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `true` as 1, and YAML reads `yes` and `on` as true
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("bool_given", "true/false has no meaning here")
        return value


class TermConfig(Section):
    """One divergence of a composed soft loss."""

    name: DivergenceName
    """Name of the divergence, as in `distill.divergence`."""

    weight: NotNegative = 1.0
    """Factor of this term within the soft loss."""

    temperature: Positive | None = None
    """Temperature of this term; null takes `distill.temperature`."""

    beta: Share | None = None
    """`beta` of this term; null takes `distill.beta`."""

    alpha: Share | None = None
    """`alpha` of this term; null takes `distill.alpha`."""


class DistillConfig(Section):
    """The objective, and how its loss is computed."""

    divergence: DivergenceName = "forward_kl"
    """Soft loss between the student's q and the teacher's p; formulas in the README."""

    terms: tuple[TermConfig, ...] | None = None
    """Several divergences in one pass instead of `divergence`: [{name: forward_kl, weight: 0.7}, ...]."""

    temperature: Positive = 1.0
    """Divides both models' logits in the soft loss; the hard loss and generation never see it."""

    temperature_power: NotNegative = 2.0
    """The soft loss is multiplied by temperature ** temperature_power, value and gradient alike."""

    soft_weight: NotNegative = 0.5
    """Weight of the soft loss (the mean over tokens of `soft_on`); 0 skips the teacher altogether."""

    hard_weight: NotNegative = 0.5
    """Weight of the cross-entropy against the labels (per valid token); 0 skips it."""

    soft_on: Literal["trained", "all"] = "trained"
    """Tokens that the soft loss and the metrics count on. `trained`: those that are trained on, as in the hard loss.
    `all`: prompts too, every token that both models predict, never padding; the hard loss stays on the trained ones.
    Each loss is the mean over its own tokens. For causal language models."""

    beta: Share = 0.5
    """The teacher's share of the jsd mixture m = beta p + (1 - beta) q. The ends are refused: the
    divergence tends to 0 there. Use forward_kl or reverse_kl."""

    alpha: Share = 0.1
    """Skewed divergences: share of the teacher mixed into the student (skew_kl), or of the student
    mixed into the teacher (skew_reverse_kl). At 0 they are forward_kl and reverse_kl."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the hard loss's target spread evenly over the vocabulary."""

    z_loss_weight: NotNegative = 0.0
    """Adds z_loss_weight * logsumexp(student logits)^2 to the hard loss of each token."""

    ignore_index: int = -100
    """Rows with this label count in neither loss and cost no matrix product; with `soft_on: all` in no hard loss."""

    chunk_size: Literal["auto"] | PositiveInt = "auto"
    """Rows per chunk, a hard cap. `auto`: on a GPU as many as its products need to be limited by arithmetic and not
    by memory (about 1000 on an H100), fewer where `loss_memory_mb` or free memory holds fewer; on a CPU as many as
    `loss_memory_mb` allows. Ranks agree on the smallest."""

    loss_memory_mb: Positive | None = None
    """Memory for the two logits buffers of one chunk, in MiB; with `chunk_size: auto` only. null: no limit of its own
    on a GPU, 512 on a CPU."""

    logits_dtype: Literal["float32", "input"] = "float32"
    """`float32`: logits of half-precision models are never rounded. `input` rounds them to the models'
    precision, under autocast to its: faster where the hardware has no fp32 result, but gradients are off by several per
    cent, and by all of their size once the models are close."""

    exchange: Literal["auto", ExchangeMode] = "auto"
    """What crosses the wire for sharded heads. `weight`: each head, once per micro-batch; where the teacher runs ahead,
    its own once per step, and a frozen untied one of an FSDP2 student, too (FSDP1 and ZeRO-3 gather that each time).
    `logits`: the student's head, and chunk by chunk the teacher's logits: every rank keeps a vocabulary slice of its
    head. `stats`: hidden states and a few numbers per token; every rank keeps a vocabulary slice of both heads.
    `auto` is the one that moves fewest bytes, as the first step that trains prints."""

    row_kernel: Literal["auto", "compile", "triton", "eager"] = "auto"
    """What computes one chunk's rows: `compile` is torch.compile, `triton` a Triton kernel (CUDA),
    `eager` plain PyTorch; `auto` is `compile` where a compiler is found."""

    metrics: bool = True
    """Measure agreement, entropies, acceptance rate and KL at temperature 1 in the same pass."""

    @property
    def soft_everywhere(self) -> bool:
        """Whether there is a soft loss, and it counts on tokens that are not trained on."""
        return self.soft_on == "all" and self.soft_weight > 0

    @model_validator(mode="after")
    def _some_weight(self) -> DistillConfig:
        if self.soft_weight == 0 and self.hard_weight == 0:
            raise ValueError("soft_weight and hard_weight are both 0: nothing would be trained; set one of them > 0")
        if self.hard_weight == 0 and (self.label_smoothing or self.z_loss_weight):
            raise ValueError("label_smoothing and z_loss_weight are parts of the hard loss: set hard_weight > 0")
        return self

    @model_validator(mode="after")
    def _possible_exchange(self) -> DistillConfig:
        names = [self.divergence, *(term.name for term in self.terms or ())]
        if self.exchange in ("logits", "stats") and (sorting := [name for name in names if sorts(name)]):
            raise ValueError(
                f"exchange {self.exchange} cuts the vocabulary, which {sorting[0]} must sort: use exchange weight"
            )
        return self

    @model_validator(mode="after")
    def _one_objective(self) -> DistillConfig:
        if self.terms is None:
            return self
        if "divergence" in self.model_fields_set:
            raise ValueError("terms replaces divergence: keep one of them")
        if not self.terms:
            raise ValueError("terms is an empty list: name a divergence as in [{name: forward_kl}], or leave it out")
        if not any(term.weight for term in self.terms):
            raise ValueError("terms has no term with a weight > 0: give one, or set soft_weight to 0")
        sorting = [term.name for term in self.terms if sorts(term.name)]
        if sorting and len(sorting) < len(self.terms):
            raise ValueError(f"{sorting[0]} pairs tokens in order of probability, the other terms by id: use it alone")
        return self
