"""What crosses the wire for the heads of sharded models: weights, the teacher's logits, or statistics.

What each costs is in `exchange.cost`.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear

from kd_plugin.distributed.collectives import all_gather_object, num_ranks
from kd_plugin.distributed.layout import VocabCut, is_gathered, vocab_cut
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.distributed.vocab_slice import cut
from kd_plugin.exchange import cost
from kd_plugin.exchange.cost import Head
from kd_plugin.exchange.teacher_slice import SliceConsumer, TeacherHead, TeacherSlice
from kd_plugin.loss import processor
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.matmul import autocast_dtype
from kd_plugin.settings.distill import DistillConfig, ExchangeMode

logger = logging.getLogger(__name__)


class ExchangeMismatch(ValueError):
    """The ranks are not set up for the same loss."""


class Exchange:
    """What the ranks of one plugin exchange for the heads: the mode that they settle, and the slices that it cuts."""

    def __init__(self, config: DistillConfig, group: dist.ProcessGroup | None) -> None:
        self.config, self.group = config, group
        self.mode: ExchangeMode | None = None
        """`weight`, `logits` or `stats`, settled by the first forward; `auto` by the first that trains."""
        self.teacher: TeacherHead | None = None
        """The head of the attached teacher."""
        self.served = 1
        """Micro-batches that one gather of a frozen head serves, as far as is known when the mode is settled."""
        self._cut: VocabCut | None = None
        self._alone = False
        self._agreed: set[bool] = set()
        self._teacher_slice: TeacherSlice | None = None

    @uncompiled
    def check_step(self, head: Linear, teacher: object = None) -> None:
        """Refuse a step in which the ranks would not compute the same, before it runs. Collective in the first call.

        Without gradients a rank may be alone, and none is waited for, unless the student's `head` or `teacher` (as it
        is called) is sharded, so that the forward is collective anyway: judged by what is the same on all ranks.

        Raises:
            ExchangeMismatch: the ranks' settings or models differ.
        """
        self._look_at(head.weight)
        may_be = num_ranks(self.group) > 1 and not torch.is_grad_enabled() and self._cut is None
        self._alone = may_be and not is_gathered(teacher)
        if not self._alone:
            self.compare_ranks(head)

    def compare_ranks(self, head: Linear) -> None:
        """The comparison of `check_step` alone, for before the student's forward. Collective in the first call.

        Without gradients only the ranks that exchange take part: one copy of an HSDP model may evaluate alone.
        """
        training = torch.is_grad_enabled()
        group = self.group if training else self._exchange_group
        if self._agreed & {True, training} or num_ranks(group) == 1:
            return
        settings = self.config.model_dump(exclude={"row_kernel"})  # of which any gives the same numbers
        compared: dict[str, object] = {f"distill.{name}": value for name, value in settings.items()}
        compared["torch.autocast"] = {kind: dtype for kind in ("cpu", "cuda") if (dtype := autocast_dtype(kind))}
        for side, module in (("student", head), ("teacher", self.teacher and self.teacher.linear)):
            compared[f"the {side}'s vocabulary"] = module and module.out_features
            compared[f"the {side}'s width"] = module and module.in_features
            compared[f"the dtype of the {side}'s head"] = module and str(module.weight.dtype)
        _agree(group, compared, settle=training and head.weight.device.type == "cpu")
        self._agreed.add(training)

    def _look_at(self, weight: Tensor) -> None:
        """Learn over which ranks the student's head is cut, before a tied or grouped one is gathered for the step.

        Under HSDP they are one of several groups. The exchange stays within it: what the groups have to tell each
        other is the gradient.
        """
        cut_now = vocab_cut(weight)
        if cut_now is not None and cut_now != self._cut:
            self._cut, self.mode, self._teacher_slice = cut_now, None, None

    @property
    def _exchange_group(self) -> dist.ProcessGroup | None:
        """The ranks that exchange."""
        return self.group if self._cut is None else self._cut.group

    @property
    def in_groups(self) -> bool:
        """Whether groups of ranks exchange among themselves, as in each copy of a model under HSDP."""
        return num_ranks(self._exchange_group) < num_ranks(self.group)

    def slice_consumer(self, call: HeadCall, hidden: Tensor, weight: Tensor, student_size: int) -> SliceConsumer | None:
        """What takes the teacher's hidden states in modes `logits` and `stats`, and gives `call` its teacher.

        None in mode `weight`, where the head is used whole. The arguments and the collectives are those of
        `cuts_vocabulary`.
        """
        if not self.cuts_vocabulary(hidden, weight, student_size):
            return None
        if self._teacher_slice is None:
            teacher_size = None if self.teacher is None else self.teacher.vocab_size
            vocab_slice = cut(student_size, teacher_size, self._exchange_group)
            self._teacher_slice = TeacherSlice(self.teacher, vocab_slice, with_statistics=self.mode == "stats")
        return self._teacher_slice.consumer(call)

    def forget_teacher(self) -> None:
        """The teacher does something else to its logits than before, so what was kept of it is of no use."""
        if self.teacher is not None:
            self.teacher.after_head = None
        if self._teacher_slice is not None:
            self._teacher_slice.forget()

    def cuts_vocabulary(self, hidden: Tensor, weight: Tensor, student_size: int) -> bool:
        """Whether each rank is left with a slice of the vocabulary (modes `logits` and `stats`); settles the mode.

        To be asked after `check`. With `auto`, collective in the first call that trains.

        Args:
            hidden: the student's hidden states `[B, S, D]`.
            weight: of the student's head, as its wrapper leaves it outside of the head's forward.
            student_size: V.

        Raises:
            ValueError: the configured mode is not possible with the student's wrapper.
        """
        if self._alone:
            return False
        if self.mode is None:
            if self.config.exchange == "auto" and not torch.is_grad_enabled():
                return False  # how many rows an evaluation has says nothing about the steps
            self.mode = self._settle(hidden, weight, student_size)
        return self.mode != "weight"

    def _settle(self, hidden: Tensor, weight: Tensor, student_size: int) -> ExchangeMode:
        wanted = self.config.exchange
        settled = cost.by_settings(self.config, ranks=num_ranks(self.group))
        if wanted in ("logits", "stats") and settled != wanted:
            why = "one process exchanges nothing" if num_ranks(self.group) == 1 else "soft_weight is 0: no teacher"
            logger.info("distill.exchange: %s has no effect: %s", wanted, why)
        if settled == "weight" or (settled is None and self.teacher is None):
            return "weight"
        elsewhere = vocab_cut(weight) is not None and weight.device != hidden.device
        if wanted == "stats" and elsewhere:
            raise ValueError(
                "distill.exchange stats multiplies by the weights of the student's head that are here, but the wrapper "
                f"keeps them on {weight.device} and the hidden states are on {hidden.device}: possible are weight and "
                "logits, and stats without CPU offload of the student"
            )
        if settled is not None:
            return settled
        return self._cheapest(hidden, weight, student_size, without=["stats"] if elsewhere else [])

    def _cheapest(
        self, hidden: Tensor, weight: Tensor, student_size: int, *, without: list[ExchangeMode]
    ) -> ExchangeMode:
        """The mode with the fewest bytes, of those that are possible, said by rank 0. Collective.

        Where the wrapper does not leave the student's head in slices (ZeRO, FSDP1, DDP, tied to an embedding that has
        been gathered), only the teacher's share is counted: the head's own traffic is the same in every mode.
        """
        assert self.teacher is not None
        ranks, width, item = num_ranks(self._exchange_group), hidden.shape[-1], hidden.element_size()
        # All must decide from the same numbers
        told = hidden.numel() // width, self.teacher.ranks(self.group), self.served
        everyone = all_gather_object(told, self.group, "numbers of rows (once, in the first step)")
        rows, teacher_ranks, served = (max(numbers) for numbers in zip(*everyone, strict=True))
        is_cut = vocab_cut(weight) is not None
        reduced = cost.REDUCED_BYTES if weight.requires_grad else 0
        student = Head(student_size, width, ranks if is_cut else 1, item, reduced, 1 if reduced else served)
        teacher = Head(self.teacher.vocab_size, self.teacher.width, teacher_ranks, item, served=served)
        mode, volumes = cost.cheapest(self.config, student, teacher, rows, ranks=ranks, without=without)
        if dist.get_rank(self.group) == 0:
            listed = ", ".join(f"{name} {volume / 1e6:.4g} MB" for name, volume in volumes.items())
            text = _described(student, teacher, rows, ranks=ranks, is_cut=is_cut)
            logger.info("distill.exchange: auto -> %s (per rank and micro-batch: %s; %s)", mode, listed, text)
        return mode


def _described(student: Head, teacher: Head, rows: int, *, ranks: int, is_cut: bool) -> str:
    """The numbers that the volumes follow from."""
    text = f"W {ranks}, rows {rows}, V {student.vocab_size}, D {student.width}, E {teacher.width}"
    text += "" if teacher.vocab_size == student.vocab_size else f", V' {teacher.vocab_size}"
    text += "" if is_cut else ", the student's head is whole in each"
    text += "" if student.reduced_bytes else ", the student's head is frozen"
    if teacher.ranks == 1:
        return f"{text}, the teacher's head is there anyway"
    return text + (f", the teacher's head is gathered once for {teacher.served:g}" if teacher.served > 1 else "")


def _agree(group: dist.ProcessGroup | None, compared: dict[str, object], *, settle: bool) -> None:
    """All ranks must say the same, else every rank raises. One collective of objects.

    With `settle`, what processors differ in is settled by it too: products are then as wide as the oldest one needs.
    """
    told = compared, processor.emulated_here()
    everyone = all_gather_object(told, group, "settings of the loss (once, in the first step)")
    if settle:
        processor.settle(emulated for _, emulated in everyone)
    for name in compared:
        values = [settings[name] for settings, _ in everyone]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ExchangeMismatch(f"{name} differs between ranks ({listed}): give every rank the same configuration")
