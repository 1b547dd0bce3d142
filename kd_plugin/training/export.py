"""The trained student as an ordinary Transformers folder.

The weights are put into a model that no wrapper and no plugin has touched, so the folder knows nothing of how
it was trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.engines.protocol import Engine
from kd_plugin.training.checkpoint import PARTIAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ExportError", "export_student"]


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
) -> None:
    """Write the student and its tokenizer with `save_pretrained` (safetensors), on rank 0. All ranks call this.

    `card` is the folder's README.md, left out where it is empty.
    `build` makes a model of the student's architecture, whose weights do not matter. The folder is written
    aside and renamed when complete.

    Raises:
        ExportError: on all ranks, when a weight is NaN or infinite; nothing is written.
    """
    state = engine.full_state_dict()
    _refuse_broken(state)
    if dist.get_rank() == 0:
        model = build().to(dtype)  # pyright: ignore[reportArgumentType]  (its decorator loses `self`)
        model.load_state_dict(state)
        partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _refuse_broken(state: dict[str, torch.Tensor]) -> None:
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    count = reduce_numbers({"broken": len(broken)}, op="max")["broken"]  # rank 0 holds the weights, all must stop
    if count:
        example = f", the first is {broken[0]}" if broken else ""
        raise ExportError(f"{count:.0f} of the student's tensors hold NaN or infinity{example}: not exported")
