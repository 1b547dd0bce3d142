# pyright: strict
# pyright: reportDeprecated=false, reportPrivateUsage=false, reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
"""`attach` a teacher to a student: `student(input_ids, labels=...).loss` becomes the distillation loss.

One forward of the student in distillation mode is its backbone (`student_side`), then both heads (`both_heads`), of
which its own computes the loss.

With `labels`, the student's forward also takes `num_items_in_batch` (valid tokens of the whole optimizer step over
all ranks, as the Hugging Face Trainer passes it: then loss = local sum / num_items_in_batch and the caller undoes the
wrapper's averaging), `loss_rows` (flat indices of the rows that count, found on the host) and `token_weights` (`[B,
S]`, by row: that of the token which row s predicts). With `distill.soft_on: all` the soft loss counts on every token
that both models predict, which `attention_mask` and `position_ids` tell (`plugin.soft_rows`), or on `loss_rows`; then
`soft_items_in_batch` (such rows of the whole step) goes with `num_items_in_batch`.

Without `num_items_in_batch` one collective counts the valid tokens of all ranks (in exchange logits and stats the one
that settles the chunks anyway, but with `soft_on: all`), and the loss is scaled so that gradients averaged over the
ranks are those of the global mean; over several micro-batches that is a mean of means. The output has a loss and no
logits. What a mixture of experts adds to its loss (router losses) is added with the model's own coefficients, as if it
were a loss of each valid token: a step has the mean of its forwards' router losses, weighted by their valid tokens.
Without gradients and without `num_items_in_batch` the loss is the mean over this rank's tokens, for which no other rank
is needed; only where FSDP or ZeRO-3 shards a model do its forwards want all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kd_plugin.distributed.collectives import located, named_in_wrapper, num_ranks
from kd_plugin.exchange.agreed_chunk import AgreedChunk
from kd_plugin.exchange.mode import Exchange
from kd_plugin.loss import checks
from kd_plugin.plugin import arguments, causal_lm
from kd_plugin.plugin.both_heads import BothHeads
from kd_plugin.plugin.label_reader import LabelReader
from kd_plugin.plugin.labels import check_same_rows
from kd_plugin.plugin.metrics import Measures
from kd_plugin.plugin.model_output import check_readable, model_output, per_item
from kd_plugin.plugin.replaced_forward import NamedCall
from kd_plugin.plugin.router_loss import with_router_loss
from kd_plugin.plugin.soft_rows import Given, call_of, check_convention, known_items
from kd_plugin.plugin.student_side import StudentSide
from kd_plugin.plugin.teacher_inputs import taken_from
from kd_plugin.plugin.teacher_side import TeacherSide
from kd_plugin.plugin.token_ids import check_inputs
from kd_plugin.plugin.tokenizers import TokenizerPair
from kd_plugin.plugin.wrappers import before_first_step
from kd_plugin.settings.run import DistillConfig

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput


class Plugin:
    """A student bound to its teacher; made by `attach`."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, config: DistillConfig, group: ProcessGroup | None = None
    ) -> None:
        self.config, self.group = config, group
        self.student = student
        self.teacher = teacher
        """The teacher as it is to be called; set it to the wrapper made after `attach`."""
        self.exchange = Exchange(config, group)
        self.agreed_chunk = AgreedChunk(group)
        self.labels: LabelReader
        """How the student's labels are read."""
        self._undo: list[Callable[[], None]] = []
        self._measures = Measures()

    def metrics(self) -> dict[str, float]:
        """Means per valid token since the last call, over all ranks. One collective: call it on every rank.

        With `distill.soft_on: all` hard_loss is per trained token. Where there was no token, that is said.

        Keys: loss, soft_loss, hard_loss, router_loss (of a mixture of experts that adds one; a part of loss),
        the metrics of `divergences.measures.MEASURED` (entropies and KL in nats), valid_tokens (and of them
        trained_tokens, with `soft_on: all`), temperature, chunk_size, logits_avoided_gib and loss_peak_gib (of the
        largest forward on any rank), and this rank's wall time in student_ms (backbone), teacher_ms (backbone),
        loss_ms, summed over forwards.
        """
        values = self._measures.take(self.config, self._student.linear.weight.device, self.group, self.chunk_size)
        watch = self._student.watch
        (watch.measured if values["valid_tokens"] else watch.nothing_measured)()
        return values

    def teacher_ahead(self, micro_batches: Sequence[Mapping[str, Any]], together: int | None = None) -> bool:
        """Run the teacher over several micro-batches of the optimizer step to come, before the student.

        A sharded teacher is then gathered once for all of them. The student's forwards must follow with the very
        tensors, in any order. Where the teacher's forward is collective, call this on every rank, with as many
        micro-batches.

        Args:
            micro_batches: the keyword arguments of each forward; what concerns the loss is not read.
            together: how many the teacher reads at once; None: all.

        Returns:
            Whether it has run. Before the first step with gradients it does not: that step settles what is kept.

        Raises:
            ValueError: micro-batches that cannot be put together (`TeacherAhead.run`), an encoder-decoder, or
                `together` below 1.
        """
        return self._heads.run_ahead(micro_batches, together, self.teacher)

    @contextmanager
    def objective(self, config: DistillConfig) -> Iterator[None]:
        """Compute the loss as `config` says for a while, as an evaluation does; what crosses the wire stays."""
        before = self.config
        self.config = config
        self._student.set_config(config)
        try:
            yield
        finally:
            self.config = before
            self._student.set_config(before)

    @property
    def sides(self) -> dict[str, StudentSide | TeacherSide]:
        """What has taken over each model, by "student" and "teacher"; the latter only where there is a soft loss."""
        return self._heads.sides

    def unmeasured(self) -> AbstractContextManager[None]:
        """Measure the body apart: `metrics()` in it is about the body alone, and after it about everything else."""
        return self._measures.aside()

    @property
    def chunk_size(self) -> int:
        """Rows per chunk, resolved."""
        return self.agreed_chunk.rows(self.config, self._heads.vocab_sizes, self._student.linear.weight)

    def detach(self) -> None:
        """Give both models back as they were; state_dict keys never changed. Calling it twice does nothing."""
        while self._undo:
            self._undo.pop()()

    def _attach(self) -> None:
        self._student = student = StudentSide(self.student, self._distill_forward, self.config)
        self.labels = student.labels
        self._undo.append(student.restore)
        check_convention(self.config, student.labels.convention, student.model)
        if num_ranks(self.group) > 1:
            self._undo.append(NamedCall(student.model).restore)
            self._undo.append(before_first_step(student.slot.module, self._compare_ranks))
        teacher = None
        if self.config.soft_weight and self.teacher is not None:
            teacher = TeacherSide(self.teacher, self.exchange, self._measures.watch)
            self._undo.append(teacher.restore)
            check_same_rows(student.labels.convention, teacher.convention)
            checks.warn_of_untrained_ids(self.config, student.slot.module, student.vocab_size, teacher.head.vocab_size)
        self._heads = BothHeads(student, teacher, self.exchange, self._measures.watch)

    def _compare_ranks(self) -> None:
        """Compare the ranks' heads before a wrapper gathers them and fails, in its own words, where they differ."""
        self.exchange.compare_ranks(self._student.linear)

    @torch.compiler.disable(recursive=False)
    def _distill_forward(
        self,
        *args: Any,
        labels: Tensor | None = None,  # [B, S], unshifted for a causal LM
        shift_labels: Tensor | None = None,  # [B, S], already shifted
        num_items_in_batch: int | Tensor | None = None,
        soft_items_in_batch: int | Tensor | None = None,
        loss_rows: Tensor | None = None,  # [n] flat indices of the rows that count
        token_weights: Tensor | None = None,  # [B, S], by row
        **kwargs: Any,
    ) -> object:
        """The student's forward. Without labels, the original one."""
        student = self._student
        inputs = {**inspect.signature(student.own_forward).bind_partial(*args).arguments, **kwargs}
        labels, own = inputs.pop("labels", labels), taken_from(inputs)
        if labels is None and shift_labels is None:
            return student.own_forward(**inputs)
        # Who has counted the rows on the host has looked at the ids there, and the step waits for nothing.
        looked_at = loss_rows is not None
        vocab_size, ignored = None if looked_at else student.vocab_size, self.config.ignore_index
        targets = student.labels.targets(inputs, labels, shift_labels, ignore_index=ignored, vocab_size=vocab_size)
        if not looked_at:
            teacher = causal_lm.unwrap(self.teacher) if self.config.soft_weight else None
            check_inputs(inputs, student.model, teacher, None if own is None else own.inputs)
        inputs.pop("logits_to_keep", None)
        mode, chunk_size = self.exchange.mode or self.config.exchange, self.config.chunk_size
        with located(lambda: f"{targets.numel()} rows, exchange {mode}, chunk_size {chunk_size}"):
            with named_in_wrapper("in its forward"), student.watch.our_forward():
                given = Given(loss_rows, token_weights, num_items_in_batch, soft_items_in_batch, own)
                output = self._loss(inputs, targets, given)
        student.watch.loss_ran()
        return output

    @torch.compiler.disable(recursive=False)
    def _loss(self, inputs: dict[str, Any], targets: Tensor, given: Given) -> ModelOutput:  # targets [B, S] by row
        call = call_of(self.config, inputs, targets, given, self._student.model)
        if self.config.soft_weight:
            check_readable(inputs)
        self.exchange.check_step(self._student.linear, self.teacher if self.config.soft_weight else None)
        with self._measures.watch.region("student", targets.device):
            backbone, router_loss = self._student.backbone(inputs, targets.device)
        hidden = backbone.hidden_states
        checks.loss_targets(targets, hidden.shape[:-1], self.config)
        known = known_items(call, hidden, self.config.ignore_index, given, self.group)
        call.chunk_size = self.agreed_chunk.of_step(self.config, self._heads.vocab_sizes, hidden)
        loss_sum = self._heads.loss_sum(hidden, call, given.read_by_teacher(inputs), self.teacher)
        assert call.sums is not None
        self._measures.add(call.sums, router_loss)
        counted = None if self.exchange.in_groups else call.sums.group_rows
        loss_sum = with_router_loss(loss_sum, router_loss, call.sums)
        loss = per_item(loss_sum, call.sums.num_valid, given.num_items, self.group, counted, known)
        return model_output(loss, backbone.output, self._student.model.config)


def attach(
    student: nn.Module,
    teacher: nn.Module | None,
    config: DistillConfig | None = None,
    *,
    group: ProcessGroup | None = None,
    tokenizers: TokenizerPair | None = None,
) -> Plugin:
    """Make `student(input_ids, labels=...).loss` the distillation loss; call it before wrapping the student.

    Args:
        student: a Hugging Face causal language model or encoder-decoder, not yet sharded.
        teacher: likewise, sharded already or later (then set `plugin.teacher` to what wraps it: DDP, FSDP1, a
            DeepSpeed engine). One wrapper around both will do: a module that holds student and teacher, or the
            teacher as a submodule of the student. It is frozen, set to eval, and serves one student. None if
            `soft_weight` is 0.
        config: the objective; default `DistillConfig()`.
        group: ranks over which the data is split; default: all.
        tokenizers: `(student_tokenizer, teacher_tokenizer)`, compared if given.

    Returns:
        The plugin: `metrics()`, `detach()`; what the student's forward then takes and returns is said there.

    A student with more token ids than its teacher: cross-entropy and perplexity are the student's own, over all its
    ids, and any of them may be a label; the soft loss is over the ids of both; kl_t1, top1_agreement and
    acceptance_rate give the others probability 0 under the teacher. With `hard_weight=0` nothing trains the others,
    which a warning says. Ids that only the teacher has do not exist.

    Raises:
        ValueError: a head that is sharded, quantised or not linear, logits changed in an unknown way, a student
            attached twice or to a teacher that shares its parameters, or tokenizers that differ.
    """
    config = DistillConfig() if config is None else config
    arguments.of_attach(student, teacher, config, tokenizers)
    plugin = Plugin(student, teacher, config, group)
    try:
        plugin._attach()
    except Exception:
        plugin.detach()
        raise
    return plugin


__all__ = ["Plugin", "attach"]
