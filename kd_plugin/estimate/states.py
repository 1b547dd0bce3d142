"""Bytes on the fullest rank that stay from step to step: parameters, gradients and the optimizer.

FSDP2 cuts dimension 0, so rank 0 has ceil(size / W) of it: with many ranks and small matrices that is more
than 1 / W. FSDP1 and ZeRO cut flat ranges, and ZeRO leaves parameters below its threshold whole.
"""

from __future__ import annotations

from kd_plugin.distributed.layout import chunk_length
from kd_plugin.estimate.quantization import Packed, adamw_bytes
from kd_plugin.estimate.setup import Line, Setup, frozen_item, has_8_bit_states, teacher_packed
from kd_plugin.estimate.sizes import ModelSizes, Weight

__all__ = ["host_states", "shard_numel", "student_states", "teacher_states"]

_FLOAT = 4


def shard_numel(setup: Setup, weight: Weight) -> int:
    """Elements of `weight` on the fullest rank."""
    ranks = setup.group_ranks
    if setup.mode == "fsdp":
        return chunk_length(weight.rows, ranks) * weight.columns
    if setup.mode == "fsdp1":
        return -(-weight.numel // ranks)
    if setup.mode == "zero3":
        return weight.numel if weight.numel <= setup.persistence else -(-weight.numel // ranks)
    return weight.numel


def student_states(setup: Setup) -> list[Line]:
    """Parameters, gradients and optimizer of the student."""
    every = [weight for unit in setup.student.units for weight in unit.weights]
    trained = [weight for weight in every if weight.trainable]
    kept = sum(shard_numel(setup, weight) for weight in every)
    if setup.is_zero:
        return _zero_states(setup, kept)
    learnt = sum(shard_numel(setup, weight) for weight in trained)
    reduced = _reduced(setup, learnt)
    cuts = {"fsdp": f"ceil(dimension 0 / {setup.group_ranks}) of each", "fsdp1": f"1 / {setup.group_ranks}"}
    cut = cuts.get(setup.mode, "whole")
    return [
        _parameters(setup, kept, learnt, cut),
        Line("student gradients", _FLOAT * reduced, f"{reduced:,} x 4 B, reduced in fp32"),
        _adamw(setup, trained),
    ]


def _adamw(setup: Setup, trained: list[Weight]) -> Line:
    each = [shard_numel(setup, weight) for weight in trained]
    if not has_8_bit_states(setup):
        return Line("AdamW", 2 * _FLOAT * sum(each), f"{sum(each):,} x 8 B (two moments)")
    how = f"{sum(each):,} numbers in two moments, with scales; 8 B each in parameters too small for 8 bits"
    return Line("AdamW, 8 bits", sum(map(adamw_bytes, each)), how)


def _parameters(setup: Setup, kept: int, learnt: int, cut: str) -> Line:
    item = frozen_item(setup)
    if item == _FLOAT:
        return Line("student parameters", _FLOAT * kept, f"{kept:,} x 4 B (fp32 masters), {cut}")
    frozen = kept - learnt
    how = f"{learnt:,} x 4 B (fp32 masters) + {frozen:,} x {item} B (frozen), {cut}"
    return Line("student parameters", _FLOAT * learnt + item * frozen, how)


def _reduced(setup: Setup, learnt: int) -> int:
    """Elements of the gradients on the fullest rank: FSDP1 keeps one for each unit in which something is trained."""
    if setup.mode != "fsdp1":
        return learnt
    return sum(shard_numel(setup, weight) for unit in setup.student.learning for weight in unit.weights)


def _zero_states(setup: Setup, kept: int) -> list[Line]:
    """The student under DeepSpeed, with `kept` elements of its parameters on this rank."""
    stage, item, ranks, whole = int(setup.mode[-1]), setup.student_item, setup.world_size, setup.student.trainable
    part = -(-whole // ranks) if stage else whole
    gradients = part if stage >= 2 else whole
    masters = part if stage or item < _FLOAT else 0
    masters_how = f"{masters:,} x 4 B" + (f", 1 / {ranks}" if stage else "")
    return [
        Line("student parameters", item * kept, f"{kept:,} x {item} B, {_zero_cut(setup)}"),
        Line("student gradients", item * gradients, f"{gradients:,} x {item} B" + (" (1 / W)" if stage >= 2 else "")),
        *([Line("fp32 masters", _FLOAT * masters, masters_how)] if masters else []),
        Line("AdamW", 2 * _FLOAT * part, f"{part:,} x 8 B" + (f", 1 / {ranks}" if stage else "")),
        Line(
            "ZeRO's gradient bucket", item * min(setup.reduce_bucket, whole), f"reduce_bucket_size x {item} B at most"
        ),
    ]


def _zero_cut(setup: Setup) -> str:
    if setup.mode != "zero3":
        return "whole"
    return f"1 / {setup.world_size}, parameters up to {setup.persistence:,} elements whole"


def teacher_states(setup: Setup) -> list[Line]:
    """The teacher's parameters on the device, and its slice of the head where that is a copy."""
    teacher, item = setup.teacher, setup.teacher_item
    if teacher is None:
        return []
    lines = [] if setup.teacher_streamed else [_teacher_parameters(setup, teacher)]
    if setup.exchange != "weight" and not setup.teacher_slice_held:
        size = setup.teacher_slice_size
        how = f"{size} x E {teacher.width} x {item} B, a copy"
        lines.append(Line("teacher head, own slice", size * teacher.width * item, how))
    return lines


def _teacher_parameters(setup: Setup, teacher: ModelSizes) -> Line:
    item, ranks = setup.teacher_item, setup.teacher_ranks
    if (packed := teacher_packed(setup)) is not None:
        return _packed_teacher(setup, teacher, packed)
    if ranks == 1:
        return Line("teacher", item * teacher.numel, f"{teacher.numel:,} x {item} B, whole on each rank")
    sharded = {"ddp": "fsdp"}.get(setup.mode, "zero3" if setup.is_zero else setup.mode)
    spread = setup.spread(mode=sharded, teacher_sharded=True)
    kept = sum(shard_numel(spread, weight) for unit in teacher.units for weight in unit.weights)
    return Line("teacher", item * kept, f"{kept:,} x {item} B, cut over {ranks} ranks")


def _packed_teacher(setup: Setup, teacher: ModelSizes, packed: Packed) -> Line:
    item, every = setup.teacher_item, [weight for unit in teacher.units for weight in unit.weights]
    linear = [weight for weight in every if weight.linear]
    size = sum(packed.num_bytes(weight.rows, weight.columns, item, setup.device) for weight in linear)
    count = sum(weight.numel for weight in linear)
    rest = teacher.numel - count
    how = f"{count:,} numbers as {packed.name}, {size / max(1, count):.3g} B each with scales"
    if packed.bits is None:
        how = f"{count:,} x {item} B, unquantised, as nothing here knows the bytes of {packed.name}"
    return Line("teacher", size + item * rest, f"{how} + {rest:,} x {item} B, whole on each rank")


def host_states(setup: Setup) -> tuple[Line, ...]:
    """The parameters of a teacher that waits in host memory."""
    if setup.teacher is None or not setup.teacher_streamed:
        return ()
    line = _teacher_parameters(setup, setup.teacher)
    return (line._replace(how=f"{line.how}; copied to the GPU layer by layer in every micro-batch"),)
