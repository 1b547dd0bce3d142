"""What crosses the wire for the heads of sharded models: weights, the teacher's logits, or statistics.

What each costs is in `exchange.cost`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear

from kd_plugin.distributed.collectives import all_gather_object, num_ranks
from kd_plugin.distributed.layout import VocabCut, held_slice, is_gathered, sharded_over, vocab_cut
from kd_plugin.distributed.uncompiled import uncompiled
from kd_plugin.distributed.vocab_slice import VocabSlice, cut
from kd_plugin.exchange import cost
from kd_plugin.exchange.cost import Head
from kd_plugin.exchange.sharded_teachers import ShardedHeadTeacher
from kd_plugin.loss import processor
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import AfterHead, HeadTeacher
from kd_plugin.settings.run import DistillConfig

logger = logging.getLogger(__name__)

_REDUCE_BYTES = 4  # gradients are reduced in fp32 (engines.fsdp_units)


class Consumer:
    """What becomes of the teacher's hidden states. A plain object, so that no wrapper looks inside."""

    def __init__(self, use: Callable[[HeadTeacher], None], use_hidden: Callable[[Tensor], None] | None = None) -> None:
        self.use = use
        """Called inside the teacher head's forward, where its weight is whole."""
        self.use_hidden = use_hidden or (lambda hidden: None)
        """Called instead, without the head, unless `needs_head`."""
        self.needs_head = use_hidden is None


class ExchangeMismatch(ValueError):
    """The ranks are not set up for the same loss."""


class Exchange:
    """The mode of one plugin, and in modes `logits` and `stats` this rank's vocabulary slice of the teacher's head."""

    def __init__(self, config: DistillConfig, group: dist.ProcessGroup | None) -> None:
        self.config, self.group = config, group
        self.mode: str | None = None
        """`weight`, `logits` or `stats`, settled by the first forward; `auto` by the first that trains."""
        self.teacher_size: int | None = None
        self.teacher_width: int | None = None
        """Of the teacher's head, whole; set by `attach`, as what follows."""
        self.teacher_head: Linear | None = None
        self.teacher_after_head: AfterHead | None = None
        """What the teacher does to its logits after its head; None until it has shown that in a forward."""
        self.teacher_tied = False
        """Whether the teacher's wrapper gathers its head with the embedding, whatever the loss needs."""
        self._cut: VocabCut | None = None
        self._alone = False
        self._agreed: set[bool] = set()
        self._vocab_slice: VocabSlice | None = None
        self._teacher_slice: HeadTeacher | None = None
        self._version: int | None = None
        """The version of the whole weight that the slice is copied from."""

    @uncompiled
    def check(self, head: Linear, teacher: object = None) -> None:
        """Before anything of the step: all ranks must be about to compute the same. Collective in the first call.

        Without gradients a rank may be alone, and none is waited for, unless the student's head or `teacher` (as it
        is called) is sharded, so that the forward is collective anyway: judged by what is the same on all ranks.
        """
        self._look_at(head.weight)
        may_be = num_ranks(self.group) > 1 and not torch.is_grad_enabled() and self._cut is None
        self._alone = may_be and not is_gathered(teacher)
        if not self._alone:
            self.compare(head)

    def compare(self, head: Linear) -> None:
        """The comparison alone, which may come before the student's forward. Collective in the first call.

        Without gradients only the ranks that exchange take part: one copy of an HSDP model may evaluate alone.
        """
        training = torch.is_grad_enabled()
        group = self.group if training else self._exchange_group
        if self._agreed & {True, training} or num_ranks(group) == 1:
            return
        settings = self.config.model_dump(exclude={"row_kernel"})  # of which any gives the same numbers
        found: dict[str, object] = {f"distill.{name}": value for name, value in settings.items()}
        for side, module in (("student", head), ("teacher", self.teacher_head)):
            found[f"the {side}'s vocabulary"] = module and module.out_features
            found[f"the {side}'s width"] = module and module.in_features
            found[f"the dtype of the {side}'s head"] = module and str(module.weight.dtype)
        _agree(group, found, settle=training and head.weight.device.type == "cpu")
        self._agreed.add(training)

    def _look_at(self, weight: Tensor) -> None:
        """Learn over which ranks the student's head is cut, before a tied or grouped one is gathered for the step.

        Under HSDP they are one of several groups. The exchange stays within it: what the groups have to tell each
        other is the gradient.
        """
        cut_now = vocab_cut(weight)
        if cut_now is not None and cut_now != self._cut:
            self._cut, self.mode, self._vocab_slice, self._teacher_slice = cut_now, None, None, None

    @property
    def _exchange_group(self) -> dist.ProcessGroup | None:
        """The ranks that exchange."""
        return self.group if self._cut is None else self._cut.group

    @property
    def in_groups(self) -> bool:
        """Whether groups of ranks exchange among themselves, as in each copy of a model under HSDP."""
        return num_ranks(self._exchange_group) < num_ranks(self.group)

    def cuts_teacher(self, hidden: Tensor, weight: Tensor, student_size: int) -> bool:
        """Whether each rank keeps only rows of the teacher's head (modes `logits` and `stats`).

        `hidden` `[B, S, D]` and `weight` are the student's. With `auto`, collective in the first call. After `check`.
        """
        if self._alone:
            return False
        if self.mode is None:
            if self.config.exchange == "auto" and not torch.is_grad_enabled():
                return False  # how many rows an evaluation has says nothing about the steps
            self.mode = self._settle(hidden, weight, student_size)
        if self.mode == "weight":
            return False
        if self._vocab_slice is None:
            self._vocab_slice = cut(student_size, self.teacher_size, self._exchange_group)
        return True

    def consumer(self, call: HeadCall) -> Consumer:
        """Gives `call` a teacher of this rank's columns (`stats`) or one that gathers all columns (`logits`).

        Rows that FSDP2 leaves here are multiplied as they are. Under other wrappers, or where the vocabularies are cut
        elsewhere, the first call sees the whole head and keeps a copy of its rows.
        """
        assert self._vocab_slice is not None
        if self.mode == "stats":
            call.vocab_slice = self._vocab_slice
        if self._version != (version := self._whole_version()):  # as it is outside of the head's forward
            self._version, self._teacher_slice = version, None
        assert call.targets is not None
        # Now: a unit of norm and head is gathered by the backbone
        held = self._held_slice_of_teacher(call.targets.device)

        def keep_rows(teacher: HeadTeacher) -> None:
            if self._teacher_slice is None:
                assert self._vocab_slice is not None
                ids = self._vocab_slice.of_teacher
                self._teacher_slice = teacher.vocab_slice(ids.start, ids.stop)
            call.teacher = self._as_source(self._teacher_slice, teacher.hidden)

        def use_hidden(hidden: Tensor) -> None:
            rows = self._teacher_slice if held is None else self._after_head_of(*held)
            assert rows is not None
            call.teacher = self._as_source(rows, hidden.reshape(-1, hidden.shape[-1]))

        return Consumer(keep_rows, None if held is None and self._teacher_slice is None else use_hidden)

    def forget_teacher(self) -> None:
        """The teacher does something else to its logits than before, so what was kept of it is of no use."""
        self.teacher_after_head = self._teacher_slice = None

    def _whole_version(self) -> int | None:
        """How often the teacher's head has been written to, as a teacher that follows its student is in each step.

        None where a wrapper holds the weight, and moves it itself.
        """
        head = self.teacher_head
        if head is None or sharded_over(head.weight, head.out_features * head.in_features) != 1:
            return None
        return 0 if head.weight.is_inference() else head.weight._version

    def _held_slice_of_teacher(self, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """This rank's rows of the teacher's head as FSDP2 holds them; None where it does not, or gathers all anyway."""
        head, vocab_slice = self.teacher_head, self._vocab_slice
        assert vocab_slice is not None
        if head is None or self.teacher_tied:
            return None
        return held_slice(head, vocab_slice.teacher_bounds, vocab_slice.group, device)

    def _after_head_of(self, weight: Tensor, bias: Tensor | None) -> HeadTeacher:
        """These rows with what the teacher does to its logits, which its first forward may have shown only now."""
        after, vocab_slice = self.teacher_after_head, self._vocab_slice
        assert after is not None and vocab_slice is not None
        if after.bias is not None:
            extra = after.bias[vocab_slice.of_teacher].to(weight)
            bias = extra if bias is None else bias + extra
        return HeadTeacher(weight.new_empty(0, weight.shape[1]), weight, bias, after.transform)

    def _as_source(self, rows: HeadTeacher, hidden: Tensor) -> HeadTeacher | ShardedHeadTeacher:
        assert self._vocab_slice is not None
        own = rows.reading(hidden)
        return (
            own
            if self.mode == "stats"
            else ShardedHeadTeacher(own, self._vocab_slice.teacher_bounds, self._vocab_slice.group)
        )

    def _settle(self, hidden: Tensor, weight: Tensor, student_size: int) -> str:
        wanted = self.config.exchange
        settled = cost.by_settings(self.config, ranks=num_ranks(self.group))
        if wanted in ("logits", "stats") and settled != wanted:
            why = "one process exchanges nothing" if num_ranks(self.group) == 1 else "soft_weight is 0: no teacher"
            logger.info("distill.exchange: %s has no effect: %s", wanted, why)
        if settled == "weight" or (settled is None and self.teacher_width is None):
            return "weight"
        elsewhere = vocab_cut(weight) is not None and weight.device != hidden.device
        if wanted == "stats" and elsewhere:
            raise ValueError(
                f"distill.exchange stats multiplies by the rows of the student's head that are here, but the wrapper "
                f"keeps them on {weight.device} and the hidden states are on {hidden.device}: possible are weight and "
                "logits, and stats without CPU offload of the student"
            )
        if settled is not None:
            return settled
        heads, rows, text = self._heads(hidden, weight, student_size)
        impossible = ["stats"] if elsewhere else []
        ranks = num_ranks(self._exchange_group)
        mode, found = cost.cheapest(self.config, *heads, rows, ranks=ranks, without=impossible)
        if dist.get_rank(self.group) == 0:
            listed = ", ".join(f"{name} {volume / 1e6:.4g} MB" for name, volume in found.items())
            logger.info("distill.exchange: auto -> %s (per rank and micro-batch: %s; %s)", mode, listed, text)
        return mode

    def _heads(self, hidden: Tensor, weight: Tensor, vocab_size: int) -> tuple[tuple[Head, Head], int, str]:
        """Student's and teacher's head and the rows of a rank, of which the volumes follow; the same told. Collective.

        Of a student's head that its wrapper does not leave in rows (ZeRO, FSDP1, DDP, tied to an embedding that has
        been gathered) only the teacher's share is counted: its own traffic is the same in every mode.
        """
        ranks, width, item = num_ranks(self._exchange_group), hidden.shape[-1], hidden.element_size()
        told = hidden.numel() // width, self._teacher_ranks()  # all must decide alike, so from the same numbers
        everyone = all_gather_object(told, self.group, "numbers of rows (once, in the first step)")
        rows, teacher_ranks = (max(numbers) for numbers in zip(*everyone, strict=True))
        assert self.teacher_width is not None and self.teacher_size is not None
        is_cut = vocab_cut(weight) is not None
        reduced = _REDUCE_BYTES if weight.requires_grad else 0
        student = Head(vocab_size, width, ranks if is_cut else 1, item, reduced)
        teacher = Head(self.teacher_size, self.teacher_width, teacher_ranks, item)
        text = f"W {ranks}, rows {rows}, V {vocab_size}, D {width}, E {self.teacher_width}"
        text += "" if self.teacher_size == vocab_size else f", V' {self.teacher_size}"
        text += "" if is_cut else ", the student's head is whole in each"
        text += "" if weight.requires_grad else ", the student's head is frozen"
        text += "" if teacher.ranks > 1 else ", the teacher's head is there anyway"
        return (student, teacher), rows, text

    def _teacher_ranks(self) -> int:
        """Ranks that cut the teacher's head, where `weight` would have it gathered.

        1 also where a flat shard of FSDP1 happens to hold all of it; the other ranks know better.
        """
        if self.teacher_tied or self.teacher_head is None:
            return 1
        head = self.teacher_head
        found = sharded_over(head.weight, head.out_features * head.in_features)
        return num_ranks(self.group) if found is None else found


def _agree(group: dist.ProcessGroup | None, found: dict[str, object], *, settle: bool) -> None:
    """All ranks must say the same, else every rank raises. One collective of objects.

    With `settle`, what processors differ in is settled by it too: products are then as wide as the oldest one needs.
    """
    told = found, processor.emulated_here()
    everyone = all_gather_object(told, group, "settings of the loss (once, in the first step)")
    if settle:
        processor.settle(emulated for _, emulated in everyone)
    for name in found:
        values = [settings[name] for settings, _ in everyone]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            raise ExchangeMismatch(f"{name} differs between ranks ({listed}): give every rank the same configuration")
