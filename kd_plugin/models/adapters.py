"""LoRA adapters of peft on a student (`student.lora`), and what becomes of them: a merged model, a folder of their own.

Notable decisions:
- peft puts its layers into the model in place, and the model goes on as what it is: wrappers, checkpoints and the
  estimate see a model of its own class, and no wrapper of peft's;
- the export merges in fp32, in a model that is built anew;
- a head that is tied to its embedding has no adapter: merged, the two would no longer be one matrix.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.models.students import StudentError
from kd_plugin.settings.extras import require
from kd_plugin.settings.lora import LoraConfig
from kd_plugin.settings.run import StudentConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["add_adapters", "merged_student", "say_what_is_trained", "warn_of_idle_freeze"]

logger = logging.getLogger(__name__)

# What peft says of things that are settled here: it reads a property by a name that Transformers deprecates, it
# advises on tied heads, which are refused, and it corrects itself for the transposed layers of GPT-2.
_SETTLED = (
    ".is_gradient_checkpointing. is deprecated",
    "Model has .tie_word_embeddings=True.",
    "fan_in_fan_out is set",
)


def add_adapters(student: PreTrainedModel, lora: LoraConfig, *, seed: int) -> PeftModel:
    """Put adapters into `student`, in place, and freeze everything else; returns peft's view of it.

    `seed` decides their weights, so that all ranks start alike; the global random state is left as it was. What the
    student computes does not change.

    Raises:
        StudentError: a layer that is not there or that peft cannot adapt, or one that is tied to another.
        ImportError: peft is missing.
    """
    require("peft", "student.lora needs it")
    import peft

    tied = student.get_input_embeddings().weight is _head_of(student).weight
    targets = lora.target_modules
    _check_names(student, "target_modules", () if isinstance(targets, str) else targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=_whole_names(student, lora.modules_to_save) or None,
        use_rslora=lora.use_rslora,
    )
    try:
        with torch.random.fork_rng(devices=[]), _without_settled_warnings():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(student, config)
    except (TypeError, ValueError) as error:
        raise StudentError(f"student.lora: {_one_line(error)}") from error
    if tied:
        _refuse_tied(student)
    return adapted


def say_what_is_trained(student: nn.Module) -> None:
    """Log how many layers have adapters, and how many of the numbers are trained."""
    adapted = [name for name, module in student.named_modules() if hasattr(module, "lora_A")]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
    every = dict(student.named_parameters())
    trained = sum(parameter.numel() for parameter in every.values() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in every.values())
    logger.info(
        "student.lora: %d layers have adapters (%s); %.2fM of %.2fM parameters are trained, %.2f %%",
        *(len(adapted), kinds, trained / 1e6, total / 1e6, 100 * trained / total),
    )
    stacked = sum(p.numel() for name, p in every.items() if ".experts." in name and p.ndim == 3 and not p.requires_grad)
    if stacked:
        logger.warning(
            "student.lora: %.1fM parameters are those of experts, whose matrices lie in one and are no linear layers: "
            "they have no adapters",
            stacked / 1e6,
        )


def warn_of_idle_freeze(student: nn.Module, patterns: Iterable[str]) -> None:
    """Say which of `student.freeze` name only weights that the adapters leave as they are."""
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    for pattern in patterns:
        if not any(pattern in name for name in trained):
            logger.warning("student.freeze: %r has no effect: student.lora trains none of these", pattern)


def merged_student(
    plain: PreTrainedModel, source: StudentConfig, state: Mapping[str, Tensor], *, folder: Path | None
) -> PreTrainedModel:
    """A plain model of the student's architecture with the adapters in its weights, in fp32.

    Args:
        plain: a model in fp32 of that architecture, whose weights do not matter; it is used up.
        source: the section of the student, with `lora`.
        state: the state dict of the student that was trained, in any precision.
        folder: where the adapters are written in peft's format; None: nowhere.
    """
    assert source.lora is not None
    adapted = add_adapters(plain, source.lora, seed=0)
    plain.load_state_dict(state)
    if folder is not None:
        _write_adapters(adapted, folder, revision=source.revision)
    merged: Any = adapted.merge_and_unload()
    return merged


def _write_adapters(adapted: PeftModel, folder: Path, *, revision: str | None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which names the base as it was loaded."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = adapted.peft_config["default"]
    base = str(config.base_model_name_or_path or "")
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.revision = revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    # `auto` would ask the hub whether the vocabulary has grown, which it never does here
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config.save_pretrained(str(folder))


def _one_line(error: Exception) -> str:
    """What peft says, without the layers inside a module that it prints."""
    text = re.sub(r"\(.*\) is not supported", " is not supported", " ".join(str(error).split()))
    return text if len(text) <= 300 else f"{text[:297]}..."


def _head_of(student: PreTrainedModel) -> nn.Module:
    head = student.get_output_embeddings()
    if head is None:
        raise StudentError(f"student.lora: {type(student).__name__} has no LM head; use a causal language model")
    return head


def _check_names(student: nn.Module, key: str, names: Iterable[str]) -> None:
    """Refuse names that no module ends with: peft passes over them as long as one is found."""
    modules = [name for name, _ in student.named_modules(remove_duplicate=False) if name]
    for wanted in names:
        if not any(_is_called(module, wanted) for module in modules):
            linear = {name.rpartition(".")[2] for name, module in student.named_modules() if _is_linear(module)}
            raise StudentError(
                f"student.lora.{key}: no module is called {wanted!r}; the linear layers are {', '.join(sorted(linear))}"
            )


def _whole_names(student: nn.Module, ends: Iterable[str]) -> list[str]:
    """The modules whose names end with one of `ends`: peft, which compares letters, would take `norm` for more."""
    ends = list(ends)
    _check_names(student, "modules_to_save", ends)
    return [name for name, _ in student.named_modules() if any(_is_called(name, end) for end in ends)]


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _refuse_tied(student: PreTrainedModel) -> None:
    for module in (student.get_input_embeddings(), student.get_output_embeddings()):
        if type(module).__module__.startswith("peft."):
            raise StudentError(
                "student.lora: target_modules or modules_to_save name the head or the embedding, which are one matrix "
                "in this student (tied), and would be two when they are merged: leave both out"
            )


@contextmanager
def _without_settled_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _SETTLED:
            warnings.filterwarnings("ignore", message=message)
        yield
