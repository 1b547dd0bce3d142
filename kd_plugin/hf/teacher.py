"""The teacher of a trainer: loaded if it is a name, and placed as accelerate places the student.

Notable decisions:
- it is sharded wherever there are several ranks, also where accelerate replicates the student (DDP, ZeRO-2): a teacher
  is usually the larger model, and `teacher_sharding="replicate"` says otherwise;
- accelerate never hears of it: what `Accelerator.prepare` holds is saved, loaded and wrapped with the student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from kd_plugin.distributed.layout import is_dtensor, is_fsdp_unit, waits_for_engine
from kd_plugin.engines import fsdp_units
from kd_plugin.models.loading import load_teacher, read_config
from kd_plugin.plugin.causal_lm import unwrap_model
from kd_plugin.settings.run import TeacherConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Sharding", "TeacherError", "load_by_name", "place_teacher"]

Sharding: TypeAlias = Literal["shard", "replicate"]


class TeacherError(ValueError):
    """A teacher that is neither a model nor the name of one, or a wish that it cannot be placed by."""


def load_by_name(teacher: object) -> nn.Module | None:
    """The teacher as a module; a hub id or folder is loaded frozen, in the dtype in which it was saved.

    Raises:
        ValueError: it is something else, or cannot be loaded.
    """
    if not isinstance(teacher, str):
        if teacher is not None and not isinstance(teacher, nn.Module):
            raise TeacherError(f"teacher is a {type(teacher).__name__}; wanted a model, or its name or folder as a str")
        return teacher
    saved = read_config(TeacherConfig(model=teacher)).dtype or torch.float32
    name = str(saved).removeprefix("torch.")
    return load_teacher(TeacherConfig.model_validate({"model": teacher, "dtype": name}))


def place_teacher(teacher: nn.Module, accelerator: Accelerator, sharding: Sharding = "shard") -> nn.Module:
    """Put the teacher where it will run, after `attach`; returns what is called for it: set `plugin.teacher` to it.

    A teacher that has been sharded, dispatched (`device_map`) or quantised stays as it is.

    Args:
        teacher: a frozen model.
        accelerator: of the student, which it wraps or is about to wrap.
        sharding: on several ranks "shard" (FSDP2, or a ZeRO-3 engine under DeepSpeed) or "replicate".

    Raises:
        TeacherError: `sharding` is no such wish.
    """
    if sharding not in ("shard", "replicate"):
        raise TeacherError(f"teacher_sharding is {sharding!r}; wanted 'shard' or 'replicate'")
    model = unwrap_model(teacher)
    if _is_placed(teacher, model):
        return teacher
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    shard = sharding == "shard" and accelerator.num_processes > 1
    if plugin is not None and (shard or waits_for_engine(model)):
        from kd_plugin.engines.zero import shard_teacher

        precision = str(next(model.parameters()).dtype).removeprefix("torch.")
        return shard_teacher(teacher, plugin.deepspeed_config, precision=precision)
    if shard:
        fsdp_units.shard_teacher(model, _mesh(accelerator))
        return teacher
    return teacher.to(accelerator.device)


def _is_placed(teacher: nn.Module, model: nn.Module) -> bool:
    if teacher is not model or getattr(model, "hf_device_map", None) is not None:
        return True
    if getattr(model, "quantization_method", None) is not None:
        return True
    return any(is_fsdp_unit(module) for module in model.modules()) or any(map(is_dtensor, model.parameters()))


def _mesh(accelerator: Accelerator) -> Any:
    """The ranks over which accelerate shards the student, where it has a mesh of its own (HSDP); else all."""
    mesh, plan = getattr(accelerator, "torch_device_mesh", None), getattr(accelerator, "parallelism_config", None)
    if mesh is not None and plan is not None and plan.fsdp_dim_names:
        return mesh[tuple(plan.fsdp_dim_names)]
    return fsdp_units.make_mesh(accelerator.device.type, accelerator.num_processes)
