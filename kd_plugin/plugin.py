"""`attach` a teacher to a student: `student(input_ids, labels=...).loss` becomes the distillation loss.

One forward of the student in distillation mode:

    student backbone -> teacher(...) under no_grad -> teacher backbone -> teacher.lm_head
                                                                         \\-> student.lm_head: the loss

Each head is only ever used inside its own module's forward, the student's nested in the teacher's, because
that is where every wrapper (DDP, FSDP1, FSDP2, ZeRO-3) guarantees a whole weight and a reduced gradient.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_plugin import causal_lm, checks, lora
from kd_plugin.bypass import BypassWatch
from kd_plugin.chunks import rows_per_chunk
from kd_plugin.collectives import located, of_others
from kd_plugin.config import DistillConfig
from kd_plugin.exchange import Consumer, Exchange
from kd_plugin.first_step import before_first_step
from kd_plugin.head import DistillHead, HeadCall, teacher_head_forward
from kd_plugin.measures import Measures
from kd_plugin.metrics import num_ranks
from kd_plugin.objective import make_objective
from kd_plugin.parallel.fsdp import row_shards
from kd_plugin.replaced import NamedCall, ReplacedForward, is_replaced
from kd_plugin.router_loss import RouterLoss, with_router_loss
from kd_plugin.step import check_readable, model_output, per_item, row_targets
from kd_plugin.teachers import HeadTeacher
from kd_plugin.vocabulary import check_tokenizers

# Inputs of one model's own bookkeeping, of no use to the other.
_NOT_FOR_TEACHER = {"past_key_values", "use_cache", "cache_position", "inputs_embeds", "output_attentions"}
_NOT_FOR_TEACHER |= {"output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"}


class Plugin:
    """A student bound to its teacher; made by `attach`."""

    def __init__(self, student: nn.Module, teacher: Any, config: DistillConfig, group: Any = None) -> None:
        self.config, self.group = config, group
        self.student = student
        self.teacher = teacher
        """The teacher as it is to be called; set it to the wrapper made after `attach`."""
        self.exchange = Exchange(config, group)
        self._undo: list[Callable[[], None]] = []
        self._measures = Measures()
        self._router = RouterLoss()

    def metrics(self) -> dict[str, float]:
        """Means per valid token since the last call, over all ranks. One collective: call it on every rank.

        Keys: loss, soft_loss, hard_loss, router_loss (of a mixture of experts that adds one; a part of loss),
        teacher_entropy, student_entropy (nats), top1_agreement,
        acceptance_rate, kl_t1, valid_tokens, temperature, chunk_size, logits_avoided_gib, loss_peak_gib, and
        this rank's wall time in student_ms (backbone), teacher_ms (backbone), loss_ms, summed over forwards.
        """
        return self._measures.take(self.config, self._slot.module.weight.device, self.group, self.chunk_size)

    @contextmanager
    def objective(self, config: DistillConfig) -> Iterator[None]:
        """Compute the loss as `config` says for a while, as an evaluation does; what crosses the wire stays."""
        before = self.config
        self._set_config(config)
        try:
            yield
        finally:
            self._set_config(before)

    def _set_config(self, config: DistillConfig) -> None:
        self.config = config
        for module in self._slot.module.modules():  # peft's modules_to_save has two heads, of which one is at work
            if isinstance(module, DistillHead):
                module.distill_config = config

    @property
    def chunk_size(self) -> int:
        """Rows per chunk, resolved."""
        teachers = self.exchange.teacher_size if make_objective(self.config).by_rank else None
        return rows_per_chunk(self.config.chunk_size, self.config.loss_memory_mb, self.student_vocab_size, teachers)

    @property
    def student_vocab_size(self) -> int:
        """Rows of the student's head, whole."""
        return causal_lm.unwrap(self._slot.module).out_features

    def detach(self) -> None:
        """Give both models back as they were; state_dict keys never changed. Calling it twice does nothing."""
        while self._undo:
            self._undo.pop()()

    # -- attaching ------------------------------------------------------------------------------------------

    def _attach_student(self) -> None:
        model = causal_lm.unwrap(self.student)
        self._slot = slot = causal_lm.find_head(model, "student")
        lora.check_student(model, slot)
        transform, logits_bias = causal_lm.logit_transform(model, slot, "student")
        make = functools.partial(DistillHead, config=self.config, transform=transform, logits_bias=logits_bias)
        self._undo += lora.replace_head(slot, make)
        self._student_head_module = slot.module
        self._bypass = BypassWatch(model, self.student)
        self._undo.append(self._bypass.remove)
        self._student_forward = model.forward
        self._undo.append(ReplacedForward(model, self._distill_forward).restore)
        if num_ranks(self.group) > 1:
            self._undo.append(NamedCall(model).restore)
            self._undo.append(before_first_step(slot.module, self._compare_ranks))

    def _compare_ranks(self) -> None:
        """Before a wrapper gathers the head, which would fail in its own words where the ranks' heads differ."""
        self.exchange.compare(causal_lm.unwrap(self._slot.module))

    def _attach_teacher(self) -> None:
        if is_replaced(model := causal_lm.unwrap(self.teacher)):
            raise ValueError(
                "this teacher serves another student already: detach that plugin, or load the teacher twice"
            )
        self._freeze(model)
        slot = causal_lm.find_head(model, "teacher")
        checks.linear_head("the teacher's head", causal_lm.unwrap(slot.module), may_be_sharded=True)
        checks.not_tensor_parallel("the teacher's head", causal_lm.unwrap(slot.module), model)
        transform, logits_bias = causal_lm.logit_transform(model, slot, "teacher")
        model_forward, head = model.forward, causal_lm.unwrap(slot.module)
        head_forward = head.forward
        tied = causal_lm.is_tied(model, head)  # its wrapper gathers both together, and waits for both to have run
        self.exchange.teacher_size, self.exchange.teacher_width = head.out_features, head.in_features
        self.exchange.teacher_head, self.exchange.teacher_tied = head, tied
        self.exchange.teacher_transform, self.exchange.teacher_logits_bias = transform, logits_bias

        def forward(*args: Any, kd_consumer: Consumer | None = None, **kwargs: Any) -> Any:
            if kd_consumer is None:
                return model_forward(*args, **kwargs)
            with self._measures.watch.region("teacher", head.weight.device):
                hidden, _ = causal_lm.run_backbone(slot, model_forward, kwargs)
            causal_lm.still_there(slot, head, "teacher")
            if not (kd_consumer.needs_head or tied):
                return kd_consumer.use_hidden(hidden)
            return slot.module(hidden, kd_consumer)

        def call_head(hidden_states: Tensor, kd_consumer: Consumer | None = None) -> Tensor:
            if kd_consumer is None:
                return head_forward(hidden_states)
            kd_consumer.use(teacher_head_forward(head, hidden_states, transform, logits_bias))
            return hidden_states.new_zeros(())

        self._undo.append(ReplacedForward(model, forward).restore)
        self._undo.append(ReplacedForward(head, call_head).restore)

    def _freeze(self, teacher: nn.Module) -> None:
        trainable = [p for p in teacher.parameters() if p.requires_grad]
        modes = [(module, module.training) for module in teacher.modules()]  # some may differ from the rest

        def restore() -> None:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, training in modes:
                module.training = training

        teacher.requires_grad_(False)
        teacher.eval()
        self._undo.append(restore)

    # -- one step -------------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)
    def _distill_forward(
        self,
        *args: Any,
        labels: Tensor | None = None,  # [B, S], unshifted for a causal LM
        shift_labels: Tensor | None = None,  # [B, S], already shifted
        num_items_in_batch: int | Tensor | None = None,
        loss_rows: Tensor | None = None,  # [n] flat indices of the rows that count
        token_weights: Tensor | None = None,  # [B, S], by row
        **kwargs: Any,
    ) -> Any:
        """The student's forward. Without labels, the original one."""
        inputs = {**inspect.signature(self._student_forward).bind_partial(*args).arguments, **kwargs}
        labels = inputs.pop("labels", labels)
        if labels is None and shift_labels is None:
            return self._student_forward(**inputs)
        model_config, ignore = causal_lm.unwrap(self.student).config, self.config.ignore_index
        targets = row_targets(inputs, labels, shift_labels, model_config, ignore)
        inputs.pop("logits_to_keep", None)
        mode, chunk_size = self.exchange.mode or self.config.exchange, self.config.chunk_size
        with located(lambda: f"{targets.numel()} rows, exchange {mode}, chunk_size {chunk_size}"):
            with of_others("in its forward"):
                return self._loss(inputs, targets, loss_rows, token_weights, num_items_in_batch)

    @torch.compiler.disable(recursive=False)
    def _loss(
        self,
        inputs: dict[str, Any],
        targets: Tensor,  # [B, S] by row
        loss_rows: Tensor | None,
        token_weights: Tensor | None,
        num_items: int | Tensor | None,
    ) -> Any:
        self._bypass.check()
        causal_lm.still_there(self._slot, self._student_head_module, "student")
        needs_teacher = bool(self.config.soft_weight)
        if needs_teacher:
            check_readable(inputs)
        self.exchange.check(causal_lm.unwrap(self._slot.module), self.teacher if needs_teacher else None)
        model_config, device = causal_lm.unwrap(self.student).config, targets.device
        sizes = {"config": model_config, "vocab_size": self.student_vocab_size, "device": device}
        with self._measures.watch.region("student", device):
            hidden, router_loss = self._router.run_backbone(self._slot, self._student_forward, inputs, **sizes)
        checks.loss_targets(targets, hidden.shape[:-1], self.config)
        checks.token_weights(token_weights, hidden)
        weights = None if token_weights is None else token_weights.reshape(-1)
        call = HeadCall(None, targets.reshape(-1), loss_rows, weights)
        loss_sum = self._through_heads(hidden, call, inputs)
        assert call.sums is not None
        self._measures.add(call.sums, router_loss)
        counted = None if self.exchange.in_groups else call.sums.group_rows
        loss_sum = with_router_loss(loss_sum, router_loss, call.sums)
        loss = per_item(loss_sum, call.sums.num_valid, num_items, self.group, counted)
        return model_output(loss, model_config)

    @torch.compiler.disable
    def _through_heads(self, hidden: Tensor, call: HeadCall, inputs: dict[str, Any]) -> Tensor:
        """Run the teacher and, inside its head's forward, the student's head -> loss sum."""
        weight = causal_lm.unwrap(self._slot.module).weight
        if self.exchange.cuts_teacher(hidden, weight, self.student_vocab_size):
            return self._with_teacher_rows(hidden, call, inputs)
        if not self.config.soft_weight:
            return self._student_head(hidden, call)
        results: list[Tensor] = []
        with_gradient = torch.is_grad_enabled()

        def use(teacher: HeadTeacher) -> None:
            call.teacher = teacher
            with torch.set_grad_enabled(with_gradient):
                results.append(self._student_head(hidden, call))

        self._run_teacher(inputs, Consumer(use))
        call.teacher = None
        return results[0]

    def _with_teacher_rows(self, hidden: Tensor, call: HeadCall, inputs: dict[str, Any]) -> Tensor:
        """The same where each rank keeps rows of the teacher's head: it is whole in the first call only."""
        consumer = self.exchange.consumer(call)
        if self.config.soft_weight:
            self._run_teacher(inputs, consumer)
        loss_sum = self._student_head(hidden, call)
        call.teacher = None
        return loss_sum

    def _student_head(self, hidden: Tensor, call: HeadCall) -> Tensor:
        head = causal_lm.unwrap(self._slot.module)
        with self._measures.watch.region("loss", hidden.device):
            if call.shard is not None and row_shards(head.weight) is not None:
                return lora.on_shards(head, hidden, call)  # past the hooks that would gather the weight
            return self._slot.module(hidden, call)

    def _run_teacher(self, inputs: dict[str, Any], consumer: Consumer) -> None:
        model = causal_lm.unwrap(self.teacher)
        if model.training:  # set by the train() of a module that it is a part of
            model.eval()
        shared = {name: value for name, value in inputs.items() if name not in _NOT_FOR_TEACHER}
        with torch.no_grad():
            self.teacher(**shared, kd_consumer=consumer)


def attach(
    student: nn.Module,
    teacher: Any,
    config: DistillConfig | None = None,
    *,
    group: Any = None,
    tokenizers: Any = None,
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
        The plugin: `metrics()`, `detach()`.

    With `labels`, the student's forward also takes `num_items_in_batch` (valid tokens of the whole optimizer
    step over all ranks, as the Hugging Face Trainer passes it: then loss = local sum / num_items_in_batch and
    the caller undoes the wrapper's averaging), `loss_rows` (flat indices of the rows that count, found on the
    host) and `token_weights` (`[B, S]`, by row: that of the token which row s predicts). Without
    `num_items_in_batch` one collective counts the valid tokens of all ranks (in exchange logits and stats the one
    that settles the chunks anyway), and the loss is scaled so that gradients averaged over the ranks are those of
    the global mean; over several micro-batches that is a mean of means. The output has a loss and no logits. What a
    mixture of experts adds to its loss (router losses) is added with the model's own coefficients, as if it were a
    loss of each valid token: a step has the mean of its forwards' router losses, weighted by their valid tokens.
    Without gradients and without `num_items_in_batch` the loss is the mean over this rank's tokens, for which no
    other rank is needed; only where FSDP or ZeRO-3 shards a model do its forwards want all ranks.

    Raises:
        ValueError: a head that is sharded, quantised or not linear, logits changed in an unknown way, a student
            attached twice or to a teacher that shares its parameters, or tokenizers that differ.
    """
    config = DistillConfig() if config is None else config
    if isinstance(teacher, DistillConfig):
        raise ValueError("the teacher is missing: attach(student, teacher, config)")
    checks.distill_config(config)
    model = causal_lm.unwrap(student)
    if config.soft_weight and teacher is None:
        raise ValueError(f"soft_weight is {config.soft_weight:g} but teacher is None: pass one, or set soft_weight=0")
    if teacher is not None:
        causal_lm.check_apart(model, causal_lm.unwrap(teacher))
    if tokenizers is not None:
        check_tokenizers(*tokenizers)
    plugin = Plugin(student, teacher, config, group)
    try:
        plugin._attach_student()
        if config.soft_weight:
            plugin._attach_teacher()
    except Exception:
        plugin.detach()
        raise
    return plugin


__all__ = ["Plugin", "attach"]
