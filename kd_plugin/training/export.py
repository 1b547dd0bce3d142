"""The trained student as an ordinary Transformers folder.

The weights are put into a model that no wrapper and no plugin has touched, so the folder knows nothing of how
it was trained. Adapters (`student.lora`) are merged into it; alone, they are in a folder in it, in peft's format.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.engines.protocol import Engine
from kd_plugin.models.adapters import merged_student
from kd_plugin.settings.run import StudentConfig
from kd_plugin.training.checkpoint import PARTIAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ADAPTER", "ExportError", "export_student"]

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Folder in an export with the adapters alone."""


class ExportError(ValueError):
    """The student is not worth exporting."""


def export_student(
    engine: Engine,
    build: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    card: str = "",
    adapted: StudentConfig | None = None,
    adapter_card: str = "",
) -> None:
    """Write the student and its tokenizer with `save_pretrained` (safetensors), on rank 0. All ranks call this.

    `card` is the folder's README.md, left out where it is empty.
    `build` makes a model of the student's architecture in fp32, whose weights do not matter. The folder is written
    aside and renamed when complete. `adapted` is the section of a student with adapters: they are merged, and those on
    a model that has a name (not on layers of the teacher) are written to `ADAPTER`, too, with `adapter_card`.

    Raises:
        ExportError: on all ranks, when a weight is NaN or infinite; nothing is written.
    """
    state = engine.full_state_dict()
    _refuse_broken(state)
    if dist.get_rank() == 0:
        partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        model = build()
        if adapted is None:
            model.to(dtype)  # pyright: ignore[reportArgumentType]  (its decorator loses `self`)
            model.load_state_dict(state)
        else:
            model = _merged(model, adapted, state, partial / ADAPTER, adapter_card)
            model.to(dtype)  # pyright: ignore[reportArgumentType]
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _merged(
    plain: PreTrainedModel, adapted: StudentConfig, state: dict[str, torch.Tensor], folder: Path, card: str
) -> PreTrainedModel:
    """The student with its adapters merged; those on a model that has a name are written to `folder`."""
    if not adapted.model:
        logger.info("student.lora: the export has no folder %s, as its base, layers of the teacher, has none", ADAPTER)
        return merged_student(plain, adapted, state, folder=None)
    merged = merged_student(plain, adapted, state, folder=folder)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return merged


def _refuse_broken(state: dict[str, torch.Tensor]) -> None:
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    count = reduce_numbers({"broken": len(broken)}, op="max")["broken"]  # rank 0 holds the weights, all must stop
    if count:
        example = f", the first is {broken[0]}" if broken else ""
        raise ExportError(f"{count:.0f} of the student's tensors hold NaN or infinity{example}: not exported")
