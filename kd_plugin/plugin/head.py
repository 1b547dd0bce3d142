# pyright: strict
# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnnecessaryComparison=false
"""The student's lm_head with the loss inside its own forward.

Everything that shards models (DDP, FSDP, ZeRO) makes a module's weight whole exactly while that module's
forward runs and reduces its gradient exactly once after it. So the loss runs there: one call, one gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_plugin.distributed.layout import slice_here, vocab_cut, whole_shape
from kd_plugin.distributed.vocab_slice import VocabSlice
from kd_plugin.exchange.vocab_parallel import VocabParallelDistill
from kd_plugin.loss import checks
from kd_plugin.loss.from_hidden import counted_call, loss_sums, make_problem
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.low_rank import LowRank
from kd_plugin.loss.matmul import sum_of_biases
from kd_plugin.loss.output import DistillOutput, normalised, packed
from kd_plugin.loss.teacher import HeadTeacher, TeacherSource
from kd_plugin.plugin.plain_head import check_plain
from kd_plugin.row_kernels.row_pass import LogitTransform
from kd_plugin.settings.run import DistillConfig


class DistillHead(nn.Linear):
    """An `nn.Linear` head that can also compute the distillation loss.

    Takes over parameters, buffers and hooks of `lm_head` (the same objects, so tying and state_dict keys stay).

    Args:
        lm_head: `nn.Linear` with weight `[V, D]`, not yet sharded.
        config: the objective.
        transform: scale and soft-cap that the model applies to this head's logits.
        logits_bias: `[V]`, what the model adds to the logits besides the head's own bias.
    """

    def __init__(
        self,
        lm_head: nn.Linear,
        config: DistillConfig,
        *,
        transform: LogitTransform | None = None,
        logits_bias: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        checks.distill_config(config)
        checks.linear_head("lm_head", lm_head)
        if getattr(lm_head.forward, "__func__", None) is not type(lm_head).forward:
            raise ValueError(
                "the forward of lm_head has been replaced, as device_map does over several devices: load the student "
                "without device_map, or call accelerate.hooks.remove_hook_from_module(student, recurse=True)"
            )
        check_plain("lm_head", lm_head)
        self.__dict__.update(lm_head.__dict__)
        self.__dict__.pop("forward", None)  # accelerate leaves the original there when it removes a hook
        # peft's copy of a tied head has them swapped
        self.out_features, self.in_features = whole_shape(lm_head.weight, lm_head)
        self.distill_config = config
        own = type(lm_head).forward is not nn.Linear.forward and not isinstance(lm_head, DistillHead)
        self._taken_from: tuple[nn.Linear, ...] = (lm_head,) if own else ()  # a tuple: not registered as a submodule
        self.set_after_head(transform or LogitTransform(), logits_bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (it is called as a head is, and for more)
        self,
        hidden_states: Tensor,
        targets: Tensor | HeadCall | None = None,
        *,
        teacher: TeacherSource | tuple[Tensor, ...] | None = None,
        token_weights: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        soft_mask: Tensor | None = None,
        soft_items: int | float | Tensor | None = None,
    ) -> Tensor | DistillOutput:
        """Logits `[..., V]` without targets; otherwise the loss.

        Args:
            hidden_states: `[..., D]`.
            targets: `[...]` int64, the label of each row itself. An attached student's forward gives a `HeadCall`
                in its place, and gets the loss sum alone: wrappers see to the weight around this method only.
            teacher: `(teacher_hidden [..., E], teacher_weight [V', E])`, with a bias `[V']` as third if there is
                one; or a source of teacher logits such as `HeadTeacher` (which also takes a soft-cap).
            token_weights: `[...]`.
            num_items: divides the sums over rows; default: the valid rows of this call.
            soft_mask: bool `[...]`, the rows of the soft loss, as in `distill_loss`.
            soft_items: as there.
        """
        if isinstance(targets, HeadCall):
            return self._loss_sum(hidden_states, targets)
        if targets is None and teacher is None:
            for original in self._taken_from:  # a subclass with a forward of its own, on the same parameters
                return type(original).forward(original, hidden_states)
            return super().forward(hidden_states)
        if isinstance(teacher, (tuple, list)):
            teacher = _from_tuple(teacher, hidden_states)
        elif teacher is not None and not hasattr(teacher, "logits_into"):
            raise ValueError(f"teacher is a {type(teacher).__name__}; wanted (teacher_hidden, teacher_weight)")
        if teacher is None and self.distill_config.soft_weight:
            raise ValueError("no teacher given: pass teacher=(teacher_hidden, teacher_weight), or set soft_weight=0")
        checks.floats("hidden_states", hidden_states, "what enters the head, not token ids")
        checks.loss_targets(targets, hidden_states.shape[:-1], self.distill_config)
        options = (token_weights, num_items, soft_mask, soft_items)
        call, items = counted_call(teacher, targets, hidden_states, self.distill_config, *options)
        self._loss_sum(hidden_states, call)
        assert call.sums is not None
        return normalised(call.sums, items)

    def set_after_head(self, transform: LogitTransform, logits_bias: Tensor | None) -> None:
        """What the model does to these logits, where it could not be measured when the head was made."""
        self.transform = transform
        self._logits_bias = None if logits_bias is None else (logits_bias,)  # a tuple: not registered as a buffer

    def on_slice(self, hidden_states: Tensor, call: HeadCall) -> Tensor:
        """The loss sum, by the vocabulary slice of the weight that FSDP2 left here.

        Not through `__call__`, which would gather the weight.
        """
        cut, vocab_slice = vocab_cut(self.weight), call.vocab_slice
        assert cut is not None and vocab_slice is not None
        weight = slice_here(self.weight, cut.replicas)
        bias = None if self.bias is None else slice_here(self.bias, cut.replicas)
        if self._logits_bias is not None:
            bias = sum_of_biases(bias, self._logits_bias[0][vocab_slice.start : vocab_slice.stop].to(weight))
        # FSDP reduces every other gradient; this one already is the sum over all ranks' rows
        return self._vocab_parallel(hidden_states, weight, bias, call, vocab_slice, call.low_rank, cut.averaged)

    def on_copy(self, hidden_states: Tensor, call: HeadCall) -> Tensor:
        """The loss sum, by the copy of a frozen head that `call` has.

        Not through `__call__`, which would gather the weight.
        """
        assert call.kept_head is not None
        hidden, (weight, bias) = hidden_states.reshape(-1, hidden_states.shape[-1]), call.kept_head
        problem = make_problem(call, self.distill_config, hidden, weight.shape[0], transform=self.transform)
        call.sums = loss_sums(problem, hidden, weight, bias, None)
        return call.sums.loss_sum

    def _loss_sum(self, hidden_states: Tensor, call: HeadCall) -> Tensor:
        """The loss sum where the weight is whole; fills in `call.sums`."""
        checks.whole_weight("lm_head.weight", self.weight)
        if (vocab_slice := call.vocab_slice) is not None:
            ids, bias, low_rank = slice(vocab_slice.start, vocab_slice.stop), self._whole_bias(), call.low_rank
            bias = None if bias is None else bias[ids]
            low_rank = None if low_rank is None else low_rank.vocab_slice(ids.start, ids.stop)
            return self._vocab_parallel(hidden_states, self.weight[ids], bias, call, vocab_slice, low_rank, 1.0)
        if call.keeps_head:
            bias = self._whole_bias()
            call.kept_head = self.weight.detach().clone(), None if bias is None else bias.detach().clone()
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        problem = make_problem(call, self.distill_config, hidden, self.weight.shape[0], transform=self.transform)
        call.sums = loss_sums(problem, hidden, self.weight, self._whole_bias(), call.low_rank)
        return call.sums.loss_sum

    def _vocab_parallel(
        self,
        hidden_states: Tensor,  # [..., D]
        weight: Tensor,  # [V_r, D]
        bias: Tensor | None,  # [V_r]
        call: HeadCall,
        vocab_slice: VocabSlice,
        low_rank: LowRank | None,  # of these token ids
        weight_scale: float,
    ) -> Tensor:
        """The loss sum, each rank computing with its slice of the vocabulary; fills in `call.sums`."""
        hidden, sizes = hidden_states.reshape(-1, hidden_states.shape[-1]), vocab_slice.sizes
        problem = make_problem(
            call, self.distill_config, hidden, sizes.student, transform=self.transform, teacher_size=sizes.shared
        )
        extra: tuple[Tensor, ...] = ()
        if low_rank is not None:
            bias, extra = low_rank.plus(bias), (low_rank.factor, low_rank.up)
        loss_sum, sums = VocabParallelDistill.apply(hidden, weight, bias, problem, vocab_slice, weight_scale, *extra)
        call.sums = packed(loss_sum, sums, problem)
        return loss_sum

    def _whole_bias(self) -> Tensor | None:
        if self._logits_bias is None:
            return self.bias
        return sum_of_biases(self.bias, self._logits_bias[0].to(self.weight))


def _from_tuple(teacher: Sequence[Tensor], hidden_states: Tensor) -> HeadTeacher:
    if len(teacher) not in (2, 3):
        raise ValueError(f"teacher has {len(teacher)} parts; wanted (teacher_hidden, teacher_weight[, teacher_bias])")
    hidden, weight, bias = teacher[0], teacher[1], teacher[2] if len(teacher) == 3 else None
    checks.teacher_pair(hidden, weight, bias, hidden_states)
    return HeadTeacher(hidden, weight, bias)


def teacher_head_forward(
    head: nn.Linear, hidden_states: Tensor, transform: LogitTransform, logits_bias: Tensor | None
) -> HeadTeacher:
    """The teacher's head as a source of logits; to be called inside that head's forward, where it is whole."""
    checks.whole_weight("teacher lm_head.weight", head.weight)
    bias = head.bias
    if logits_bias is not None:
        bias = sum_of_biases(bias, logits_bias.to(head.weight))
    return HeadTeacher(hidden_states, head.weight, bias, transform)
