"""The teacher's head over the ranks: what is known of the whole, and the vocabulary slice that a rank keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Linear

from kd_plugin.distributed.collectives import num_ranks
from kd_plugin.distributed.layout import held_slice, is_dtensor, sharded_over
from kd_plugin.distributed.torch_internals import times_written
from kd_plugin.distributed.vocab_slice import VocabSlice
from kd_plugin.exchange.sharded_teachers import ShardedHeadTeacher
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.matmul import sum_of_biases
from kd_plugin.loss.teacher import AfterHead, HeadTeacher


@dataclass(eq=False)
class TeacherHead:
    """The head of an attached teacher, whatever wraps it."""

    linear: Linear
    vocab_size: int
    """V', of the whole head."""
    width: int
    """E, of the whole head."""
    tied: bool
    """Whether the teacher's wrapper gathers its head with the embedding, whatever the loss needs."""
    after_head: AfterHead | None
    """What the teacher does to its logits after its head; None until it has shown that in a forward."""

    def ranks(self, group: dist.ProcessGroup | None) -> int:
        """Ranks of `group` over which the head is cut, where `exchange: weight` would have it gathered.

        A flat shard of FSDP1 that happens to hold the whole head counts as 1, so the answers of all ranks are compared.
        """
        if self.tied:
            return 1
        ranks = self._sharded_over()
        return num_ranks(group) if ranks is None else ranks

    def version(self) -> int | None:
        """How often the head has been written to, as a teacher that follows its student is in each step.

        None where a wrapper holds the weight, and moves it itself.
        """
        return times_written(self.linear.weight) if self._sharded_over() == 1 else None

    def is_usable_in_place(self) -> bool:
        """Whether it can be multiplied by outside its module's forward: whole here, and fetched by no hook."""
        weight = self.linear.weight
        plain = not (is_dtensor(weight) or weight.is_meta or hasattr(self.linear, "_hf_hook"))
        return plain and self._sharded_over() == 1

    def bytes_ahead(self, tokens: int, *, whole: bool) -> int:
        """Bytes that a teacher leaves which runs ahead over `tokens`: hidden states, and the head where it is copied.

        `whole` says whether the loss multiplies by the whole head (`exchange: weight`).
        """
        copied = self.vocab_size if whole and not self.is_usable_in_place() else 0
        return (tokens + copied) * self.width * self.linear.weight.element_size()

    def _sharded_over(self) -> int | None:
        return sharded_over(self.linear.weight, self.linear.out_features * self.linear.in_features)


class Consumer(Protocol):
    """What becomes of the teacher's hidden states in one step.

    Implemented by plain objects, so that no wrapper looks inside: FSDP2's mixed precision would cast the tensors of a
    dataclass.
    """

    needs_head: bool
    """Whether the teacher's head has to run; otherwise `use_hidden` is called instead of `use_head`."""

    def use_head(self, teacher: HeadTeacher) -> None:
        """Called inside the forward of the teacher's head, where its weight is whole."""
        ...

    def use_hidden(self, hidden: Tensor) -> None:
        """Called with the hidden states `[..., E]` that the head would be given."""
        ...


class TeacherSlice:
    """This rank's slice of the teacher's vocabulary, of which it multiplies every rank's hidden states.

    A slice that FSDP2 leaves on the rank is multiplied as it is. Under other wrappers, or where the vocabularies are
    cut elsewhere, the first step sees the whole head and a copy of the slice is kept.

    Args:
        teacher: its head; None without a teacher.
        vocab_slice: the token ids of this rank.
        with_statistics: whether the columns are the whole teacher of this rank (`exchange: stats`) or every rank is
            sent the logits of its tokens (`logits`).
    """

    def __init__(self, teacher: TeacherHead | None, vocab_slice: VocabSlice, *, with_statistics: bool) -> None:
        self._teacher, self._vocab_slice, self._with_statistics = teacher, vocab_slice, with_statistics
        self._kept: HeadTeacher | None = None
        self._version: int | None = None
        """The version of the whole weight that the slice is copied from."""

    @property
    def is_kept(self) -> bool:
        """Whether a copy of the slice is here."""
        return self._kept is not None

    def forget(self) -> None:
        """Let go of the copy, so that the next step makes another."""
        self._kept = None

    def consumer(self, call: HeadCall) -> SliceConsumer:
        """What gives `call` its teacher, and the student's slice where that is used too; before the teacher runs."""
        if self._with_statistics:
            call.vocab_slice = self._vocab_slice
        version = None if self._teacher is None else self._teacher.version()  # as it is outside of the head's forward
        if self._version != version:
            self._version, self._kept = version, None
        return SliceConsumer(self, call)

    def keep(self, teacher: HeadTeacher) -> HeadTeacher:
        """The slice of a whole head, copied if that has not been done."""
        if self._kept is None:
            ids = self._vocab_slice.of_teacher
            self._kept = teacher.vocab_slice(ids.start, ids.stop)
        return self._kept

    def held(self, device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """Weight `[V_r, E]` and bias `[V_r]` as FSDP2 holds them; None where it does not, or gathers all anyway."""
        if self._teacher is None or self._teacher.tied:
            return None
        ids = self._vocab_slice
        return held_slice(self._teacher.linear, ids.teacher_bounds, ids.group, device)

    def without_whole_head(self, held: tuple[Tensor, Tensor | None] | None) -> HeadTeacher:
        """The slice where the whole head is not at hand: of what `held` gave, else the copy."""
        if held is None:
            assert self._kept is not None
            return self._kept
        weight, bias = held
        assert self._teacher is not None and self._teacher.after_head is not None
        after = self._teacher.after_head  # which the teacher's first forward may have shown only now
        if after.bias is not None:
            bias = sum_of_biases(bias, after.bias[self._vocab_slice.of_teacher].to(weight))
        return HeadTeacher(weight.new_empty(0, weight.shape[1]), weight, bias, after.transform)

    def source(self, own: HeadTeacher, hidden: Tensor) -> HeadTeacher | ShardedHeadTeacher:
        """Where the loss gets the logits of `hidden` `[N, E]`, with `own` as this rank's slice."""
        own, ids = own.reading(hidden), self._vocab_slice
        return own if self._with_statistics else ShardedHeadTeacher(own, ids.teacher_bounds, ids.group)


class SliceConsumer:
    """The `Consumer` of a step in which each rank has a slice of the teacher's head: it gives `call` its teacher."""

    def __init__(self, teacher_slice: TeacherSlice, call: HeadCall) -> None:
        self._slice, self._call = teacher_slice, call
        # Looked at before the teacher runs: its backbone gathers a unit of norm and head.
        assert call.targets is not None
        self._held = teacher_slice.held(call.targets.device)
        self.needs_head = self._held is None and not teacher_slice.is_kept

    def use_head(self, teacher: HeadTeacher) -> None:
        """Keep this rank's slice of the whole head."""
        self._call.teacher = self._slice.source(self._slice.keep(teacher), self._call.aligned(teacher.hidden))

    def use_hidden(self, hidden: Tensor) -> None:
        """Go on with the slice that is here."""
        own = self._slice.without_whole_head(self._held)
        self._call.teacher = self._slice.source(own, self._call.aligned(hidden))
