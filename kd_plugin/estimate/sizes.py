"""Student and teacher of a configuration without their weights: on the meta device, from configurations alone.

Notable decisions:
- the models are built by the same code as for training, so a student that cannot be made is refused here too;
- activations and work are counted, not guessed: the backbones run on the meta device (see `work`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_plugin.engines.fsdp_units import decoder_layers, embedding_and_head
from kd_plugin.estimate.work import Activations, Run, Work, run_without_values
from kd_plugin.models.adapters import add_adapters
from kd_plugin.models.loading import read_config
from kd_plugin.models.students import config_with, freeze, student_from_layers
from kd_plugin.settings.quantization import STAY_PACKED, method_of
from kd_plugin.settings.run import ModelSource, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Weight(NamedTuple):
    """One parameter: `rows` is the dimension that FSDP2 cuts."""

    rows: int
    columns: int
    trainable: bool
    linear: bool = False
    """Whether it is of a linear layer besides the head, and not left out of the teacher's quantisation."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns


class Unit(NamedTuple):
    """Parameters that are gathered together."""

    name: str
    """layer, embedding, head or rest; "embedding and head" where they are tied."""
    weights: tuple[Weight, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(weight.numel for weight in self.weights)

    @property
    def trainable(self) -> int:
        """Number of elements that get a gradient."""
        return sum(weight.numel for weight in self.weights if weight.trainable)


@dataclass(frozen=True)
class ModelSizes:
    """Everything that an estimate asks of a model."""

    kind: str
    units: tuple[Unit, ...]
    vocab_size: int
    width: int
    tied: bool
    head_trainable: bool
    activations: Activations | None
    """None if the backbone does not run on the meta device."""
    work: Work | None = None
    """What one micro-batch takes through the backbone; None likewise."""
    why_unknown: str = ""
    """Why it does not run there."""
    quantization: Mapping[str, Any] | None = None
    """How the checkpoint says that it is quantised."""

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(unit.numel for unit in self.units)

    @property
    def trainable(self) -> int:
        """Number of parameters that get a gradient."""
        return sum(unit.trainable for unit in self.units)

    @property
    def head_numel(self) -> int:
        """Number of elements of the head's weight."""
        return self.vocab_size * self.width

    @property
    def largest_layer(self) -> int:
        """Number of elements of the largest decoder layer."""
        return max(unit.numel for unit in self.units if unit.name == "layer")

    @property
    def learning(self) -> tuple[Unit, ...]:
        """Units in which something is trained."""
        return tuple(unit for unit in self.units if unit.trainable)

    @property
    def largest_layer_trained(self) -> int:
        """Number of elements that get a gradient in the decoder layer that has most of them."""
        return max(unit.trainable for unit in self.units if unit.name == "layer")


def load_sizes(config: RunConfig) -> tuple[ModelSizes, ModelSizes]:
    """Sizes of the student and the teacher of `config`; reads configurations or GGUF metadata, never weights.

    Raises:
        ModelError, StudentError, ShardingError: a model is not found, or cannot be made as configured.
    """
    of_checkpoint = read_config(config.teacher)
    teacher = _on_meta(config.teacher, of_checkpoint)
    student = _student(config, teacher)
    batch = (config.train.micro_batch_size, config.data.seq_len)
    quantization = _quantization(of_checkpoint)
    left_out = _left_out(quantization if config.teacher.quantization is None else config.teacher.quantization)
    of_student, of_teacher = (
        _sizes(
            model,
            getattr(torch, source.dtype),
            batch,
            trained=model is student,
            masked=_is_masked(config, source),
            left_out=left_out,
        )
        for model, source in ((student, config.student), (teacher, config.teacher))
    )
    return of_student, replace(of_teacher, quantization=quantization)


def _quantization(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """The block of a checkpoint's config.json that says how its weights are quantised, where they stay so."""
    blocks = [getattr(part, "quantization_config", None) for part in (config, config.get_text_config())]
    block = next((block for block in blocks if isinstance(block, Mapping)), None)
    return block if block is not None and method_of(block) in STAY_PACKED else None


def _left_out(quantization: str | Mapping[str, Any] | None) -> tuple[str, ...]:
    """Regular expressions for the modules that a mapping leaves out of quantisation, as Transformers reads its lists.

    torchao's has beginnings of names, of bitsandbytes' an item may be the end of one as well.
    """
    if quantization is None or isinstance(quantization, str):
        return ()
    beginnings = quantization.get("modules_to_not_convert") or ()
    either = quantization.get("llm_int8_skip_modules") or ()
    begins = [rf"(?:{part})(?=\.|$)" for part in (*beginnings, *either)]
    return (*begins, *(rf".*{re.escape(part)}$" for part in either))


def _is_masked(config: RunConfig, source: ModelSource) -> bool:
    """Whether packed documents are kept apart by masks: flash attention is given bounds, flex attention blocks."""
    return config.data.packing == "isolated" and source.attn_implementation in (None, "sdpa", "eager")


def _student(config: RunConfig, teacher: PreTrainedModel) -> PreTrainedModel:
    source = config.student
    if source.from_teacher:
        make_empty = partial(_on_meta, source, like=teacher)
        student = student_from_layers(teacher, source.from_teacher.layers, make_empty)
    else:
        base = read_config(source) if source.model else teacher.config
        if source.from_config is not None:
            base = config_with(base, source.from_config, where="student.from_config")
        student = _on_meta(source, base)
    if source.lora is not None:
        with torch.device("meta"):
            add_adapters(student, source.lora, seed=0)
    freeze(student, source.freeze)
    return student


def _on_meta(source: ModelSource, config: PreTrainedConfig, like: PreTrainedModel | None = None) -> PreTrainedModel:
    import transformers

    options: dict[str, Any] = {"dtype": torch.float32}
    if source.attn_implementation:
        # other fused kernels keep what sdpa keeps, and need not be installed to be counted
        options["attn_implementation"] = "eager" if source.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        if like is not None:
            return type(like)._from_config(config, **options)
        return transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=source.trust_remote_code, **options
        )


def _sizes(
    model: PreTrainedModel,
    dtype: torch.dtype,
    batch: tuple[int, int],
    *,
    trained: bool,
    masked: bool,
    left_out: Iterable[str],
) -> ModelSizes:
    embedding, head = embedding_and_head(model)
    weight = head.weight
    assert isinstance(weight, Tensor)
    tied, trainable, (vocab_size, width) = embedding.weight is weight, weight.requires_grad, weight.shape
    units = _units(model, embedding, head, _linear_weights(model, head, tuple(left_out)))
    kind, frozen = type(model).__name__, [p for p in model.parameters() if not p.requires_grad]
    run, why = _run(model, dtype, batch, with_backward=trained, masked=masked)
    for parameter in frozen:
        parameter.requires_grad_(False)
    activations, work = (None, None) if run is None else run
    return ModelSizes(kind, units, vocab_size, width, tied, trainable, activations, work, why)


def _linear_weights(model: nn.Module, head: nn.Module, left_out: tuple[str, ...]) -> set[Tensor]:
    """Weights of the linear layers besides the head, without modules whose names match one of `left_out`."""
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
        if not any(re.match(pattern, name) for pattern in left_out)
    }


def _units(model: PreTrainedModel, embedding: nn.Module, head: nn.Module, linear: set[Tensor]) -> tuple[Unit, ...]:
    parts: list[tuple[str, nn.Module]] = [("layer", layer) for layer in decoder_layers(model)]
    if embedding.weight is head.weight:
        parts.append(("embedding and head", head))
    else:
        parts += [("embedding", embedding), ("head", head)]
    seen: set[Tensor] = set()
    units = []
    for name, module in (*parts, ("rest", model)):
        own = [parameter for parameter in module.parameters() if parameter not in seen]
        seen.update(own)
        units.append(Unit(name, tuple(_weight(parameter, parameter in linear) for parameter in own)))
    return tuple(units)


def _weight(parameter: Tensor, linear: bool) -> Weight:
    rows = parameter.shape[0] if parameter.ndim else 1
    return Weight(rows, parameter.numel() // max(rows, 1), parameter.requires_grad, linear)


def _run(
    model: PreTrainedModel, dtype: torch.dtype, batch: tuple[int, int], *, with_backward: bool, masked: bool
) -> tuple[Run | None, str]:
    """Run the backbone in `dtype`. Returns None and the reason where its code does not run without values."""
    try:
        cast_model = model.to(dtype)  # pyright: ignore[reportArgumentType]  (its decorator loses `self`)
        return run_without_values(cast_model, dtype, batch, with_backward=with_backward, masked=masked), ""
    except Exception as error:  # any code may come with a model, and the rest of the estimate stands without this
        return None, f"{type(model).__name__} does not run on the meta device: {' '.join(str(error).split())[:120]}"
