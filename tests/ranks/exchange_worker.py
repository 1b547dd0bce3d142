"""Trains cases of wrappers and exchanges: FOLDER/<case>.train.pt."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kd_plugin as kd
from kd_plugin.engines import fsdp1_units, fsdp_units, zero_block
from tests.ranks.attach_worker import DeepSpeedRun, TorchRun
from tests.ranks.exchange_cases import (
    Case,
    count_soft,
    count_valid,
    dense_loss,
    make_batch,
    make_models,
    real_tokens,
    teacher_inputs,
)


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding's."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


class Pair(nn.Module):
    """Student and frozen teacher as parts of one module, for who has one wrapper for both."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's."""
        return self.student(*args, **kwargs)


def shard_by_layout(model: nn.Module, layout: str, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """FSDP2 as users write it: the head in one unit with the final norm, or left to the root."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    options = {"mesh": mesh, "mp_policy": policy}
    for layer in fsdp_units.decoder_layers(model):
        fully_shard(layer, **options)
    if layout == "grouped":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = [embedding] if is_tied(model) else []
        fully_shard([*tied, model.base_model.norm, head], reshard_after_forward=frozen, **options)
    fully_shard(model, reshard_after_forward=True if frozen else None, **options)


def shard_pair(pair: Pair, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """FSDP2 with one root: the embeddings and heads of both models are its own."""
    for model in (pair.student, pair.teacher):
        for layer in fsdp_units.decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(pair, mesh=mesh, mp_policy=policy)


def wrap_pair(pair: Pair, dtype: torch.dtype) -> nn.Module:
    """FSDP1 with one root; a tied head must stay in its embedding's unit."""
    models = [pair.student, pair.teacher]
    units = {layer for model in models for layer in fsdp_units.decoder_layers(model)}
    units |= {model.get_output_embeddings() for model in models if not is_tied(model)}
    return FullyShardedDataParallel(
        pair,
        auto_wrap_policy=CustomPolicy(lambda part: part in units),
        use_orig_params=True,
        mixed_precision=None if dtype == torch.float32 else MixedPrecision(param_dtype=dtype),
        device_id=torch.device("cpu"),
    )


class WrappedRun(TorchRun):
    """DDP, FSDP1 and the layouts of FSDP2."""

    def __init__(self, case: Case, student: nn.Module, teacher: nn.Module, plugin: Any) -> None:
        dtype = getattr(torch, case.dtype)
        self.module = self.model = student
        self.teacher, self.factor = teacher, 1 if case.counted else case.ranks
        together = Pair(student, teacher) if case.teacher == "part" else None
        size = 2 if case.wrapper == "hsdp" else case.ranks
        mesh = fsdp_units.make_mesh("cpu", case.ranks, shard_size=size)
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if case.wrapper == "ddp":
            self.model = DistributedDataParallel(together or student)
        elif case.wrapper == "fsdp1":
            if together is not None:
                self.model = wrap_pair(together, dtype)
            else:
                self.model = fsdp1_units.wrap_student(student, mesh, torch.device("cpu"), dtype=dtype)
                self.teacher = fsdp1_units.wrap_teacher(teacher, mesh, torch.device("cpu"))
        elif together is not None:
            assert case.wrapper == "root", "the other layouts have no unit for both"
            self.model = together
            shard_pair(together, mesh, policy)
        elif case.wrapper in ("alone", "hsdp"):
            fsdp_units.shard_student(student, mesh, dtype=dtype)
            fsdp_units.shard_teacher(teacher, mesh, offload=case.teacher == "offload")
        else:
            shard_by_layout(student, case.wrapper, mesh, policy)
            shard_by_layout(teacher, case.wrapper, mesh, MixedPrecisionPolicy())
        if case.loss == "dense" and case.wrapper in ("alone", "hsdp"):  # a plain head reads its weight in backward
            unit = student.get_input_embeddings() if case.tied else student.get_output_embeddings()
            unit.set_unshard_in_backward(True)
        self.optimizer = torch.optim.SGD(student.parameters(), lr=case.learning_rate)

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name."""
        fsdp1_units = isinstance(self.model, FullyShardedDataParallel)
        whole = FullyShardedDataParallel.summon_full_params(self.model) if fsdp1_units else nullcontext()
        with whole:
            found = super().parameters()
        return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in found.items()}


class EngineRun(DeepSpeedRun):
    """ZeRO-1, 2 and 3; a sharded teacher has an engine of its own."""

    def __init__(self, case: Case, student: nn.Module, teacher: nn.Module, plugin: Any) -> None:
        import deepspeed

        self.module, self.given, self.case = student, True, case
        block: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": case.dtype == "bfloat16"},
            "zero_optimization": {"stage": int(case.wrapper[-1]), "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.SGD(student.parameters(), lr=case.learning_rate)
        together = Pair(student, teacher) if case.teacher == "part" else None
        self.model, *_ = deepspeed.initialize(model=together or student, optimizer=optimizer, config=block)
        self.teacher, self.engines = teacher, [self.model]
        if together is None:
            block = zero_block.teacher_config(block, precision=case.dtype)
            self.teacher, *_ = deepspeed.initialize(model=teacher, config=block)
            self.engines.append(self.teacher)


def train(case: Case, rank: int) -> dict[str, Any]:
    """Parameters after `case`, and what of the heads is whole on this rank between steps."""
    student, teacher = make_models(case)
    teacher.to(getattr(torch, case.dtype))
    plugin = kd.attach(student, teacher, case.config) if case.loss == "attached" else None
    teacher.requires_grad_(False)
    run = (EngineRun if case.wrapper.startswith("zero") else WrappedRun)(case, student, teacher, plugin)
    if plugin is not None:
        plugin.teacher = run.teacher
    start = time.perf_counter()
    for step in range(case.steps):
        items = count_valid(case, step)
        for micro in range(case.accumulation):
            input_ids, labels = make_batch(case, step, micro, rank)
            with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
                if plugin is None:
                    loss = dense_loss(case, run.model, run.teacher, (input_ids, labels), items)
                else:
                    more: dict[str, Any] = {} if case.counted else {"num_items_in_batch": items}
                    if case.own_input:
                        more |= teacher_inputs(input_ids)
                    if case.soft_on == "all":
                        more |= {"attention_mask": real_tokens(input_ids)}
                        more |= {} if case.counted else {"soft_items_in_batch": max(count_soft(case, step), 1)}
                    loss = run.model(input_ids, labels=labels, **more).loss
            run.backward(loss)
        run.step()
    whole = [name for name, p in teacher.named_parameters() if _is_whole(p)]
    whole += _gathered_units(run.teacher)
    seconds = time.perf_counter() - start
    result = {"parameters": run.parameters(), "whole_in_teacher": whole, "seconds": seconds}
    run.close()
    return result


def _gathered_units(model: Any) -> list[str]:
    """Units of FSDP1 whose flat parameters have not been freed; nothing public says it."""
    if not isinstance(model, FullyShardedDataParallel):
        return []
    flat = {str(i): unit._flat_param for i, unit in enumerate(FullyShardedDataParallel.fsdp_modules(model))}
    return [name for name, p in flat.items() if p is not None and p._full_param_padded.untyped_storage().size() > 0]


def _is_whole(parameter: Tensor) -> bool:
    return not isinstance(parameter, DTensor) and not hasattr(parameter, "ds_id") and parameter.dim() == 2


def run(folder: Path, spec: dict[str, Any], rank: int) -> None:
    """Train the cases of `spec`, writing each result when it is there."""
    for case in (Case(**fields) for fields in spec["train"]):
        result = train(case, rank)
        if rank == 0:
            torch.save(result, folder / f"{case.name}.train.pt")
