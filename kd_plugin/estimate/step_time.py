"""How long one optimizer step takes: every phase by a roofline of products, memory and wire.

Notable decisions:
- an operation takes as long as its products or its memory, whichever is longer; operations follow one another, as eager
  PyTorch runs them, so their times add up;
- a GPU gathers parameters and reduces gradients while it computes (FSDP and ZeRO prefetch, DDP's buckets): only what
  is longer than the models' own phases counts. What the heads exchange is waited for, and on a CPU everything is: there
  the processor itself moves what crosses the wire;
- the host has to issue every operation. A CPU does nothing meanwhile; of a GPU it counts where it takes longer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from kd_plugin.estimate.setup import Setup, frozen_item, has_8_bit_states, teacher_forwards
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.estimate.speeds import LayerSpeeds, Speeds
from kd_plugin.estimate.states import shard_numel
from kd_plugin.estimate.wire import exchanges, parameters
from kd_plugin.estimate.work import Op

__all__ = ["Phase", "StepTime", "is_counted", "step_time"]

_FLOAT = 4
# Bytes that one number of a parameter costs in AdamW: 4 values read, 3 written; torch's plain loop, which DeepSpeed
# gets, goes through them operation by operation. In 8 bits four of the values are one byte each, but a CPU searches for
# their codes: 18 times as long as the fused one, measured on an AMD EPYC with AVX-512, one thread
_FUSED_ADAMW, _PLAIN_ADAMW, _IN_8_BITS = 28, 80, {"cuda": 16, "cpu": 18 * 28}
_NORM, _SCALED = 4, 8  # bytes of a gradient: read for its norm; read and written where that is clipped


class Phase(NamedTuple):
    """Seconds of one part of an optimizer step, by what takes them."""

    name: str
    products: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    """Issuing operations, where that is not hidden."""
    wire: float = 0.0
    how: str = ""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.products + self.memory + self.host + self.wire


@dataclass(frozen=True)
class StepTime:
    """How long one optimizer step takes."""

    phases: tuple[Phase, ...]
    tokens: int
    """Of one step, over all ranks."""
    speeds: Speeds

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.seconds

    @property
    def limits(self) -> dict[str, float]:
        """Shares of the step, largest first: products, memory, wire, and the host that issues operations."""
        names = ("products", "memory", "wire", "host")
        shares = {name: sum(getattr(phase, name) for phase in self.phases) / self.seconds for name in names}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))


def step_time(setup: Setup, speeds: Speeds) -> StepTime | None:
    """The time of one optimizer step of `setup` at `speeds`; None for models that do not run on the meta device."""
    if not is_counted(setup):
        return None
    models = _backbones(setup, speeds)
    phases = [*models, _loss(setup, speeds), *_around_weights(setup, speeds)]
    phases += _wire(setup, speeds, sum(phase.seconds for phase in models))
    tokens = setup.tokens * setup.accumulation * setup.world_size
    return StepTime(tuple(phase for phase in phases if phase.seconds), tokens, speeds)


def is_counted(setup: Setup) -> bool:
    """Whether the work of both models is known."""
    return all(model is None or model.work is not None for model in (setup.student, setup.teacher))


def _backbones(setup: Setup, speeds: Speeds) -> list[Phase]:
    """The passes through both models without their heads, of all micro-batches."""
    times, student = setup.accumulation, setup.student.work
    assert student is not None
    again = student.forward if setup.config.train.activation_checkpointing else Counter[Op]()
    name = "student backward" + (", forward again" if again else "")
    phases = []
    if setup.teacher is not None:
        assert setup.teacher.work is not None
        forwards = teacher_forwards(setup)
        phase = _pass("teacher forward", setup.teacher.work.forward, speeds.teacher, speeds, times, calls=forwards)
        phases.append(phase)
    return [
        *phases,
        _pass("student forward", student.forward, speeds.student, speeds, times),
        _pass(name, student.backward + again, speeds.student, speeds, times),
    ]


def _pass(
    name: str, work: Counter[Op], at: LayerSpeeds, speeds: Speeds, times: int, *, calls: int | None = None
) -> Phase:
    """`times` micro-batches through `work`, whose operations are issued for `calls` of them."""
    products = memory = 0.0
    for op, count in work.items():
        computing = op.flops / (at.attention if op.kind == "attention" else at.product)
        moving = op.num_bytes / at.elementwise
        products += count * computing * (computing >= moving)
        memory += count * moving * (computing < moving)
    number = sum(work.values())
    issued = (times if calls is None else calls) * number * speeds.operation_seconds
    hidden = times * (products + memory) if speeds.is_asynchronous else 0.0
    flops, num_bytes = (sum(getattr(op, kind) * n for op, n in work.items()) for kind in ("flops", "num_bytes"))
    how = f"{_times(times)}{flops / 1e12:,.3g} TFLOP, {num_bytes / 1e9:,.3g} GB, {number:,} operations"
    return Phase(name, times * products, times * memory, max(0.0, issued - hidden), how=how)


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def _loss(setup: Setup, speeds: Speeds) -> Phase:
    """Products of the heads and the row pass; every exchange leaves a rank as many of both."""
    student, rows, vocab, wide = setup.student, setup.rows, setup.student.vocab_size, setup.teacher_columns
    product = 2 * rows * vocab * student.width
    products = product / speeds.student_logits + product / speeds.hidden_gradient
    flops, chunks = 2 * product, -(-rows // setup.chunk)
    moved, fresh = 0.0, 0.0
    if setup.teacher is not None:
        flops += 2 * rows * wide * setup.teacher.width
        products += 2 * rows * wide * setup.teacher.width / speeds.teacher_logits
    if student.head_trainable:
        flops += product
        products += product / speeds.head_gradient
        moved += 2 * (chunks - 1) * _FLOAT * student.head_numel  # read and written, but for the first chunk
        fresh += (2 * _FLOAT + setup.student_item) * student.head_numel  # which writes it; backward scales it
    moved += _copied_heads(setup, speeds)
    passed = rows * (vocab + wide) / 2 * speeds.logit_seconds
    how = f"{_times(setup.accumulation)}{flops / 1e12:,.3g} TFLOP of heads, {rows * vocab / 1e6:,.4g} M logits"
    times = setup.accumulation
    return Phase("loss", times * products, times * (passed + moved / speeds.memory + fresh / speeds.fresh), how=how)


def _copied_heads(setup: Setup, speeds: Speeds) -> float:
    """Bytes to make half-precision heads wide for a CPU, and the gradient of the logits narrow."""
    sides = [(setup.student.head_numel, setup.student_item)]
    if setup.teacher is not None:
        sides.append((setup.teacher_columns * setup.teacher.width, setup.teacher_item))
    narrow = setup.rows * setup.student.vocab_size * (_FLOAT + setup.student_item) * (setup.student_item < _FLOAT)
    if speeds.is_asynchronous or setup.distill.logits_dtype == "input":
        return narrow
    return narrow + sum(numel * (item + _FLOAT) for numel, item in sides if item < _FLOAT)


def _around_weights(setup: Setup, speeds: Speeds) -> list[Phase]:
    """What a wrapper copies to cast, gather and reduce, and the optimizer."""
    student, times = setup.student, setup.accumulation
    kept = [(weight, shard_numel(setup, weight)) for unit in student.units for weight in unit.weights]
    own = sum(numel for _, numel in kept)
    learnt = sum(numel for weight, numel in kept if weight.trainable)
    if setup.is_zero and setup.mode != "zero0":
        learnt = -(-student.trainable // setup.world_size)
    copied = times * _copied(setup, own, learnt) + _copied_teacher(setup)
    clipped = _NORM + _SCALED * (setup.config.train.max_grad_norm is not None)
    adamw = _PLAIN_ADAMW if setup.is_zero else _FUSED_ADAMW
    adamw = clipped + (_IN_8_BITS[setup.device] if has_8_bit_states(setup) else adamw)
    return [
        Phase("casts and copies", memory=copied / speeds.fresh, how=f"{copied / 1e9:,.3g} GB to gather and reduce"),
        Phase("optimizer", memory=learnt * adamw / speeds.memory, how=f"{learnt:,} x {adamw} B (AdamW, norm)"),
    ]


def _copied(setup: Setup, own: int, learnt: int) -> float:
    """Bytes per micro-batch that the wrapper reads and writes besides what crosses the wire."""
    student, item = setup.student, setup.student_item
    if setup.is_zero:
        gathered = 2 * item * student.numel if setup.gathers_student else 0
        return gathered + 2 * item * student.trainable + (item + _FLOAT) * learnt
    wide = own if frozen_item(setup) == _FLOAT else learnt
    cast = (_FLOAT + item) * wide * (item < _FLOAT)
    # in: to the buffer that is sent; out: from the one that has arrived
    gathers = _gathers(student) / student.numel
    gathered = gathers * (cast + 2 * item * (student.numel + own * setup.gathers_student))
    reduced = (item + _FLOAT) * student.trainable + 2 * _FLOAT * learnt
    return gathered + reduced + 3 * _FLOAT * learnt * (setup.accumulation - 1) / setup.accumulation


def _copied_teacher(setup: Setup) -> float:
    """Bytes per step to send a rank's shard of the teacher and to lay out what has arrived."""
    if setup.teacher is None or not setup.teacher_sharded:
        return 0.0
    layers = setup.teacher.numel - setup.teacher.head_numel  # the head's way depends on the exchange
    return teacher_forwards(setup) * 2 * setup.teacher_item * layers * (1 + 1 / setup.teacher_ranks)


def _gathers(student: ModelSizes) -> int:
    """Elements that FSDP2 gathers for one forward and backward."""
    return student.numel + sum(unit.numel for unit in student.units if unit.name == "layer")


def _wire(setup: Setup, speeds: Speeds, computing: float) -> list[Phase]:
    """What is received for the heads, and for everything else; `computing`: seconds that can hide the latter."""
    if setup.world_size == 1:
        return []
    volume = exchanges(setup).get(setup.exchange)
    heads = 0.0 if volume is None else setup.accumulation * volume.num_bytes
    rest = sum(line.num_bytes for line in parameters(setup))
    seconds = rest / speeds.wire
    exposed = max(0.0, seconds - computing) if speeds.is_asynchronous else seconds
    how = f"{rest / 1e9:,.3g} GB" + (", while the models compute" if speeds.is_asynchronous else ", waited for")
    return [
        Phase(f"heads' exchange: {setup.exchange}", wire=heads / speeds.wire, how=f"{heads / 1e9:,.3g} GB, waited for"),
        Phase("parameters and gradients", wire=exposed, how=how),
    ]
