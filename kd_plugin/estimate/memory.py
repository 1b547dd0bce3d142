"""Bytes on the fullest rank: what stays from step to step, and what each phase of a step adds.

Notable decisions:
- the peak is what stays plus the worst phase; phases follow one another, so they are never added;
- buffers that a library takes and no formula here covers (NCCL, cuBLAS, fragmentation, the CUDA context) are
  left out and said to be.
"""

from __future__ import annotations

from dataclasses import dataclass

from kd_plugin.distributed.layout import chunk_length
from kd_plugin.engines.zero_block import uses_autocast
from kd_plugin.estimate.setup import Line, Setup, has_8_bit_states, keeps_student_head, runs_ahead, teacher_packed
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.estimate.states import host_states, shard_numel, student_states, teacher_states
from kd_plugin.row_kernels.blocks import block_rows

_FLOAT, _HALF = 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, with what they are for."""

    lasting: tuple[Line, ...]
    """What stays from step to step."""
    phases: dict[str, tuple[Line, ...]]
    """Phase of a step -> what it adds."""
    host: tuple[Line, ...] = ()
    """What waits in host memory, and is in no other figure."""

    @property
    def lasting_bytes(self) -> float:
        """Bytes held from step to step."""
        return _total(self.lasting)

    @property
    def worst_phase(self) -> str:
        """Name of the phase that adds most."""
        return max(self.phases, key=lambda name: _total(self.phases[name]))

    @property
    def peak_bytes(self) -> float:
        """Bytes held from step to step, plus those that the worst phase adds."""
        return self.lasting_bytes + _total(self.phases[self.worst_phase])

    def phase_bytes(self, name: str) -> float:
        """Bytes that the phase `name` adds."""
        return _total(self.phases[name])


def memory(setup: Setup) -> Memory:
    """Count the bytes on the fullest rank of `setup`."""
    kept = _teacher_kept(setup)
    held = [*kept, *_activations(setup), *_kept_gathered(setup)]
    phases: dict[str, tuple[Line, ...]] = {}
    if setup.teacher is not None:
        before = kept if runs_ahead(setup) else held
        phases["teacher forward"] = (*before, *_teacher_forward(setup, setup.teacher))
    phases["loss"] = (*held, *heads(setup), *loss(setup))
    if setup.student.head_trainable:
        phases["head's gradient reduced"] = (*held, *_head_gradient(setup))
    phases["layers' backward"] = (*held, *_layers_backward(setup))
    if setup.is_zero:
        phases["optimizer step"] = _zero_step(setup)
    elif has_8_bit_states(setup):
        phases["optimizer step"] = _step_in_8_bits(setup)
    return Memory((*student_states(setup), *teacher_states(setup)), phases, host_states(setup))


def heads(setup: Setup) -> tuple[Line, ...]:
    """Head weights that exist only while the loss runs, beyond the shards that stay."""
    student, teacher, lines = setup.student, setup.teacher, []
    item, whole = setup.student_item, setup.mode in ("zero0", "zero1", "zero2")
    is_cut = setup.exchange == "stats" and setup.student_head_is_cut and setup.world_size > 1
    if is_cut and item != _FLOAT:
        size = setup.slice_size * student.width * item
        lines.append(Line("student head, own slice", size, f"{setup.slice_size} x {student.width} x {item} B"))
    elif not (is_cut or whole):
        lines.append(_whole_head(setup, "student", student, item, "V", gathered=setup.gathers_student))
    copied = runs_ahead(setup) and setup.teacher_sharded
    if teacher is not None and setup.teacher_gathered and setup.exchange == "weight" and not copied:
        lines.append(_whole_head(setup, "teacher", teacher, setup.teacher_item, "V'", gathered=True))
    return (*lines, *_copied_heads(setup, is_cut))


def _whole_head(setup: Setup, side: str, model: ModelSizes, item: int, vocab: str, *, gathered: bool) -> Line:
    """A head's whole weight: twice under FSDP2, which keeps the buffer of its last gather beside what is read."""
    copies = 2 if gathered and not setup.is_zero and setup.mode != "fsdp1" else 1
    width = "D" if side == "student" else "E"
    how = f"{vocab} {model.vocab_size} x {width} {model.width} x {item} B"
    how = f"2 x {how}: as gathered, and as read" if copies == 2 else how
    return Line(f"{side} head, whole", copies * model.head_numel * item, how)


def _copied_heads(setup: Setup, is_cut: bool) -> list[Line]:
    """Copies of the heads that the loss multiplies by: in fp32 on a CPU, rounded under autocast."""
    cut = setup.exchange != "weight" and setup.world_size > 1
    columns = setup.slice_size if is_cut or setup.exchange == "stats" else setup.student.vocab_size
    lines = [_copied_head(setup, "student", setup.student, setup.student_item, columns)]
    if setup.teacher is not None:
        columns = setup.teacher_slice_size if cut else setup.teacher_columns
        lines.append(_copied_head(setup, "teacher", setup.teacher, setup.teacher_item, columns))
    return [line for line in lines if line is not None]


def _copied_head(setup: Setup, side: str, model: ModelSizes, item: int, columns: int) -> Line | None:
    """`columns` token ids of a head in another dtype; None where it is multiplied as it is.

    A CPU multiplies in fp32, also what autocast has rounded; some processors hold half as much (`loss.half_products`).
    """
    narrowed = setup.is_zero and uses_autocast(setup.config.deepspeed) and item == _FLOAT
    in_fp32 = setup.device == "cpu" and setup.distill.logits_dtype == "float32" and (narrowed or item < _FLOAT)
    if not (narrowed or in_fp32):
        return None
    copied, kind, why = (_FLOAT, "in fp32", "CPU only") if in_fp32 else (_HALF, "as autocast rounds it", "a copy")
    how = f"{columns} x {model.width} x {copied} B, {why}"
    return Line(f"{side} head {kind}", columns * model.width * copied, how)


def loss(setup: Setup) -> tuple[Line, ...]:
    """Bytes that the loss allocates beyond its inputs (hidden states and heads)."""
    student, teacher, chunk, ranks = setup.student, setup.teacher, setup.chunk, setup.exchange_ranks
    by_rows = setup.exchange == "stats" and ranks > 1
    rows = ranks * chunk if by_rows else max(chunk, 2)
    lines = [_chunk_buffers(setup, rows, by_rows)]
    columns = setup.slice_size if by_rows else student.vocab_size
    if setup.device == "cpu" and setup.distill.row_kernel in ("auto", "compile"):
        block = min(rows, block_rows(columns, "cpu"))
        lines.append(Line("row kernel", 3 * _FLOAT * block * columns, f"3 x 4 B x {block} rows x {columns}, compiled"))
    if setup.exchange == "logits" and ranks > 1 and teacher is not None:
        size = 3 * _FLOAT * chunk * setup.teacher_columns
        lines.append(Line("teacher logits under way", size, "3 x 4 C V': one chunk arrived, one sent, one arriving"))
    if by_rows:
        lines += _gathered_states(setup)
    return (*lines, *_gradients_of_loss(setup, columns))


def _gradients_of_loss(setup: Setup, columns: int) -> list[Line]:
    """Gradients that the loss keeps until backward: of its hidden states, and of `columns` token ids of the head."""
    student, item = setup.student, setup.student_item
    lines = [Line("dX", setup.rows * student.width * item, f"n {setup.rows} x D {student.width} x {item} B")]
    if student.head_trainable:
        size = columns * student.width * _FLOAT
        lines.append(Line("dW", size, f"{columns} token ids x D {student.width} x 4 B"))
    return lines


def _chunk_buffers(setup: Setup, rows: int, by_rows: bool) -> Line:
    own = setup.slice_size if by_rows else setup.student.vocab_size
    other = setup.teacher_slice_size if by_rows else setup.teacher_columns
    sides = f"2 x 4 B x {rows} rows x {own}" if own == other else f"4 B x {rows} rows x ({own} + {other})"
    why = f"W {setup.exchange_ranks} x C {setup.chunk} rows, V / W ids" if by_rows else f"C {rows}, V {own}, V' {other}"
    return Line("chunk buffers", _FLOAT * rows * (own + other), f"{sides} token ids ({why})")


def _gathered_states(setup: Setup) -> list[Line]:
    """Hidden states of all ranks, and the gradient that goes back to them."""
    rows, width, item = setup.exchange_ranks * setup.chunk, setup.student.width, setup.student_item
    wide = 0 if setup.teacher is None else setup.teacher.width * setup.teacher_item
    upcast = item if item < _FLOAT else 0  # the product before it is made wide
    ahead = 2 if setup.rows > setup.chunk else 1  # the next chunk's are on their way
    size = rows * (width * (_FLOAT + upcast) + ahead * (width * item + wide))
    how = f"{rows} rows: both models' states{', of two chunks' if ahead == 2 else ''}, and the partial dX in fp32"
    return [Line("all ranks' hidden states", size, how)]


def _activations(setup: Setup) -> list[Line]:
    kept = setup.student.activations
    if kept is None:
        return []
    layers = len(kept.layers)
    if not setup.config.train.activation_checkpointing:
        how = f"{layers} layers x {max(kept.layers) / 2**20:,.1f} MiB + {kept.outside / 2**20:,.1f} MiB, counted"
        if setup.config.train.compile:
            how += " eager: compiled layers keep less"
        return [Line("student activations", kept.outside + sum(kept.layers), how)]
    how = f"{layers} layer inputs x {kept.boundary / 2**20:,.1f} MiB + {kept.outside / 2**20:,.1f} MiB, counted"
    lines = [Line("student activations", kept.outside + layers * kept.boundary, how)]
    return [*lines, *_masks("student", kept.masks, "kept to recompute the layers")]


def _masks(side: str, num_bytes: float, how: str) -> list[Line]:
    """Attention masks that all layers of a model are given."""
    return [Line(f"{side}, attention masks", num_bytes, f"B x S x S, counted, {how}")] if num_bytes else []


def _kept_gathered(setup: Setup) -> list[Line]:
    """Parameters that ZeRO-3 does not free, since it needs them again soon: all of a small student's."""
    if setup.mode != "zero3" or setup.world_size == 1:
        return []
    student, item = setup.student, setup.student_item
    size = max(0, min(student.numel, setup.max_live) - student.head_numel)
    return [Line("student kept gathered", size * item, f"{size:,} x {item} B (stage3_max_live_parameters at most)")]


def _working_copy(model: ModelSizes, item: int) -> Line:
    """Gathered parameters of one layer, and of the next while it arrives."""
    size = 2 * model.largest_layer
    return Line("gathered parameters", size * item, f"2 x {model.largest_layer:,} x {item} B: this layer and the next")


def _teacher_forward(setup: Setup, teacher: ModelSizes) -> list[Line]:
    lines = []
    if setup.teacher_gathered:
        lines.append(_working_copy(teacher, setup.teacher_item))
    if teacher_packed(setup) is not None:
        largest = max((weight.numel for unit in teacher.units for weight in unit.weights if weight.linear), default=0)
        size, how = largest * setup.teacher_item, f"{largest:,} x {setup.teacher_item} B: the largest, one at a time"
        lines.append(Line("teacher weight, unpacked", size, how))
    if teacher.activations is not None:
        together = min(setup.accumulation, setup.together)
        size, how = together * max(teacher.activations.layers), "what a layer would keep for backward; nothing stays"
        several = f"; of {together} micro-batches" if together > 1 else ""
        lines.append(Line("teacher, one layer's tensors", size, how + several))
        lines += _masks("teacher", together * teacher.activations.masks, f"for all layers{several}")
    return lines


def _teacher_kept(setup: Setup) -> list[Line]:
    """What a teacher that has run ahead leaves for the micro-batches of a step, most of it after its last forward."""
    teacher, item = setup.teacher, setup.teacher_item
    if teacher is None or not runs_ahead(setup):
        return []
    tokens = setup.accumulation * setup.tokens
    how = f"{tokens} tokens x E {teacher.width} x {item} B, of all micro-batches"
    lines = [Line("teacher's hidden states", tokens * teacher.width * item, how)]
    if setup.exchange == "weight" and setup.teacher_sharded:
        how = f"V' {teacher.vocab_size} x E {teacher.width} x {item} B, a copy for the step"
        lines.append(Line("teacher head, whole", teacher.head_numel * item, how))
    if setup.exchange == "weight" and keeps_student_head(setup):
        student, item = setup.student, setup.student_item
        how = f"V {student.vocab_size} x D {student.width} x {item} B, a copy for the step, being frozen"
        lines.append(Line("student head, kept", student.head_numel * item, how))
    return lines


def _head_gradient(setup: Setup) -> list[Line]:
    student, item, ranks = setup.student, setup.student_item, setup.group_ranks
    if not setup.is_zero:
        if setup.exchange == "stats" and setup.student_head_is_cut:
            size = chunk_length(student.vocab_size, ranks) * student.width * _FLOAT
            if setup.copies > 1:
                return [Line("dW, summed", 3 * size, "the accumulated rows, scaled, and the sum over the copies, fp32")]
            return [Line("dW, scaled", size, "the accumulated rows, scaled in place, fp32")]
        again = item if setup.mode == "fsdp1" and setup.gathers_student and not student.tied else 0
        size = student.head_numel * (again + item + _FLOAT) + student.head_numel * _FLOAT / ranks
        how = f"V D x ({item} B gradient + 4 B to be reduced + 4 B / W"
        return [Line("dW on its way", size, f"{how} + {again} B gathered)" if again else f"{how})")]
    size = student.head_numel * (item + _FLOAT)
    return [Line("dW, scaled", size, f"V D x (4 B accumulated + {item} B handed to ZeRO)")]


def _layers_backward(setup: Setup) -> list[Line]:
    student, item, lines = setup.student, setup.student_item, []
    if not setup.is_zero:
        lines.append(_working_copy(student, item))
    reduced, learnt = 0 if setup.is_zero else _FLOAT, student.largest_layer_trained
    if setup.mode == "fsdp1" and learnt:  # whose unit is one parameter with one gradient
        learnt = student.largest_layer
    lines.append(
        Line("one layer's gradients", learnt * (item + reduced), f"{learnt:,} x ({item} B + {reduced} B reduced)")
    )
    if setup.config.train.activation_checkpointing and student.activations is not None:
        size = max(student.activations.layers)
        lines.append(Line("recomputed layer", size, "one layer's activations at a time"))
    return lines


def _zero_step(setup: Setup) -> tuple[Line, ...]:
    trained = setup.student.trainable
    part = -(-trained // setup.world_size) if setup.mode != "zero0" else trained
    return (Line("gradients in fp32", _FLOAT * part, f"{part:,} x 4 B while AdamW runs"),)


def _step_in_8_bits(setup: Setup) -> tuple[Line, ...]:
    trained = [weight for unit in setup.student.units for weight in unit.weights if weight.trainable]
    largest = max(shard_numel(setup, weight) for weight in trained)
    how = f"{largest:,} x 8 B: both moments of the largest parameter, compiled"
    return (Line("moments in fp32", 2 * _FLOAT * largest, how),)


def _total(lines: tuple[Line, ...]) -> float:
    return sum(line.num_bytes for line in lines)
