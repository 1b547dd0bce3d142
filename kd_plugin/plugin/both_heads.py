"""The heads of student and teacher in one step, on the way from hidden states to the loss.

    teacher(...) under no_grad -> teacher backbone -> teacher.lm_head
                                                     \\-> student.lm_head: the loss

Each head is only ever used inside its own module's forward, the student's nested in the teacher's, because that is
where every wrapper (DDP, FSDP1, FSDP2, ZeRO-3) guarantees a whole weight and a reduced gradient. Where each rank has a
slice of the teacher's head (`distill.exchange` logits and stats), the teacher runs first, and the student's head after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin.distributed.torch_internals import times_written
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.exchange.mode import Exchange
from kd_plugin.exchange.teacher_slice import SliceConsumer
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.plugin.metrics import Stopwatch
from kd_plugin.plugin.student_side import StudentSide
from kd_plugin.plugin.teacher_ahead import TeacherAhead
from kd_plugin.plugin.teacher_side import TeacherSide


class BothHeads:
    """The heads of an attached student and its teacher.

    Args:
        student: whose head computes the loss.
        teacher: None without one.
        exchange: settles what crosses the wire between ranks.
        watch: measures the time of the loss.
    """

    def __init__(self, student: StudentSide, teacher: TeacherSide | None, exchange: Exchange, watch: Stopwatch) -> None:
        self._student, self.teacher, self._exchange, self._watch = student, teacher, exchange, watch
        self._ahead = None if teacher is None else TeacherAhead(teacher)
        self._kept_head: tuple[int, tuple[Tensor, Tensor | None]] | None = None
        """A copy of the student's frozen head, for the rest of a step, and how often it had been written to."""

    @property
    def sides(self) -> dict[str, StudentSide | TeacherSide]:
        """What has taken over each model, by "student" and "teacher"; the latter only where there is a soft loss."""
        student: dict[str, StudentSide | TeacherSide] = {"student": self._student}
        return student if self.teacher is None else student | {"teacher": self.teacher}

    @property
    def vocab_sizes(self) -> tuple[int, int | None]:
        """Token ids of the student's head, and of the teacher's; None without one."""
        return self._student.vocab_size, None if self.teacher is None else self.teacher.head.vocab_size

    @uncompiled
    def loss_sum(self, hidden: Tensor, call: HeadCall, inputs: dict[str, Any], teacher: nn.Module | None) -> Tensor:
        """Run the teacher and the student's head -> the loss sum (0-d) of `call`, in which the other sums are left.

        Args:
            hidden: the student's hidden states `[B, S, D]`.
            call: the targets.
            inputs: of the teacher's forward: the student's, unless it reads others.
            teacher: what to call for the teacher, such as the wrapper around it.
        """
        if not self._student.config.soft_weight:
            self._slice_consumer(hidden, call)  # cuts the vocabulary without a teacher, too
            return self.student_loss(hidden, call)
        assert self.teacher is not None and self._ahead is not None and teacher is not None
        kept = self._ahead.take(inputs)
        if kept is None:
            self.teacher.look_again(inputs)
        consumer = self._slice_consumer(hidden, call) or _NestedHead(self, hidden, call)
        if kept is not None and not consumer.needs_head:
            consumer.use_hidden(kept.hidden)
        elif kept is not None and isinstance(consumer, _NestedHead):
            with self._one_gather(call):
                consumer.use_head(self._ahead.source(kept))
        else:
            self.teacher.run(teacher, inputs, consumer)
        loss_sum = consumer.loss_sum if isinstance(consumer, _NestedHead) else self.student_loss(hidden, call)
        call.teacher = None
        return loss_sum

    @contextmanager
    def _one_gather(self, call: HeadCall) -> Iterator[None]:
        """Have a frozen head of the student gathered once for all micro-batches that the teacher has read ahead."""
        assert self._ahead is not None
        written = times_written(self._student.linear.weight)
        if self._kept_head is not None and self._kept_head[0] == written:
            call.kept_head = self._kept_head[1]
        call.keeps_head = call.kept_head is None and self._ahead.has_more and self._student.can_keep_head()
        yield
        kept = call.kept_head
        self._kept_head = (written, kept) if kept is not None and self._ahead.has_more else None

    @uncompiled
    def run_ahead(
        self, micro_batches: Sequence[Mapping[str, Any]], together: int | None, teacher: nn.Module | None
    ) -> bool:
        """Run `teacher` over the micro-batches of the step to come, `together` at a time; None: all.

        Returns:
            False, and does nothing, where no teacher is asked, and before the first step has settled the exchange and
            shown what the teacher does to its logits.

        Raises:
            ValueError: `together` is below 1, or as `TeacherAhead.run`.
        """
        if together is not None and together < 1:
            raise ValueError(f"together is {together}; wanted how many micro-batches the teacher reads at once")
        if self._ahead is None or self.teacher is None or teacher is None:
            return False
        self._ahead.forget()
        self._kept_head = None
        self._exchange.served = max(1, len(micro_batches))
        ready = self._exchange.mode is not None and self.teacher.head.after_head is not None
        if not (ready and micro_batches and self._student.config.soft_weight):
            return False
        whole = self._exchange.mode == "weight"
        self._ahead.run(teacher, micro_batches, together or len(micro_batches), whole_head=whole)
        return True

    def _slice_consumer(self, hidden: Tensor, call: HeadCall) -> SliceConsumer | None:
        student = self._student
        return self._exchange.slice_consumer(call, hidden, student.linear.weight, student.vocab_size)

    def student_loss(self, hidden: Tensor, call: HeadCall) -> Tensor:
        """The loss sum (0-d) out of the student's head, timed."""
        with self._watch.region("loss", hidden.device):
            return self._student.head(hidden, call)


class _NestedHead:
    """The `Consumer` of a step in which the student's head runs inside the forward of the teacher's."""

    needs_head = True

    def __init__(self, heads: BothHeads, hidden: Tensor, call: HeadCall) -> None:
        self._heads, self._hidden, self._call = heads, hidden, call
        self._with_gradient = torch.is_grad_enabled()
        self.loss_sum: Tensor
        """0-d, once the teacher's head has run."""

    def use_head(self, teacher: HeadTeacher) -> None:
        """Compute the loss, with the gradients that the teacher's forward goes without."""
        rows = self._call.teacher_rows
        self._call.teacher = teacher if rows is None else teacher.reading(self._call.aligned(teacher.hidden))
        with torch.set_grad_enabled(self._with_gradient):
            self.loss_sum = self._heads.student_loss(self._hidden, self._call)

    def use_hidden(self, hidden: Tensor) -> None:
        """Never called, as the head is needed."""
        raise AssertionError("the teacher's head has not run")
