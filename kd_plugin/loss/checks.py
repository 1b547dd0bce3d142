"""Refusals of the loss: what was found, what is wanted, what to do."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from kd_plugin.distributed.layout import (
    has_fsdp2_unit,
    is_dtensor,
    is_in_engine,
    is_zero3,
    local_part,
    loses_reduction,
    placements_of,
)
from kd_plugin.distributed.torch_internals import is_awaited_collective, is_wrapper_subclass
from kd_plugin.divergences.objective import make_objective
from kd_plugin.settings.run import DistillConfig

logger = logging.getLogger(__name__)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_KEEP_OUT = (
    "keep the head out of quantisation (bitsandbytes: llm_int8_skip_modules=['lm_head']; others: "
    "modules_to_not_convert=['lm_head'])"
)
_TENSOR_PARALLEL = (
    "a tensor- or expert-parallel head is not supported: leave lm_head out of the parallel plan; logits that a "
    "parallel teacher has already go to DistillHead(..., teacher=kd_plugin.ShardedLogits(slice, group))"
)


def whole_weight(name: str, weight: Tensor) -> None:
    """Refuse a head weight that is sharded, partitioned, elsewhere or quantised."""
    if is_dtensor(weight) or is_awaited_collective(weight):
        kind = "a DTensor (of FSDP2 or tensor-parallel)" if is_dtensor(weight) else "an AsyncCollectiveTensor"
        raise ValueError(
            f"{name} is {kind}: its full_tensor() would lose the gradient reduction. "
            "Call the loss inside the head's own forward: kd_plugin.attach(student, teacher, config) before fully_shard"
        )
    if loses_reduction(weight):
        raise ValueError(
            f"{name} comes from full_tensor(), whose gradient stays on this rank: write "
            "full_tensor(grad_placements=[Partial('avg')]) to have it averaged over the ranks as FSDP2 does, or "
            "kd_plugin.attach(student, teacher, config) before fully_shard"
        )
    if weight.device.type == "meta":
        raise ValueError(
            f"{name} is on the meta device, its values are elsewhere (accelerate offload, or never loaded): load the "
            "model without device_map, or call accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if weight.numel() == 0 or (is_zero3(weight) and weight.dim() != 2):
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: ZeRO-3 or FSDP1 has partitioned it away. Call the loss inside "
            "its forward: kd_plugin.attach(student, teacher, config) before deepspeed.initialize or FSDP1"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; wanted [vocab, width]. A flat one comes from FSDP1: "
            "attach before wrapping, so that the loss runs inside the head's forward"
        )
    if (kind := _quantised(weight)) is not None:
        raise ValueError(f"{name} is {kind}; wanted a float weight: {_KEEP_OUT}")
    half_precision(name, weight.dtype, weight.device)


def _quantised(weight: Tensor) -> str | None:
    """What quantised kind of weight this is; None for one that can be multiplied as it is."""
    weight = local_part(weight)
    if is_wrapper_subclass(weight) or type(weight).__module__.startswith("bitsandbytes"):
        return f"{type(weight).__module__}.{type(weight).__qualname__}"
    return None if weight.dtype in _FLOATS else str(weight.dtype)


def half_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse bfloat16 on a GPU that only emulates it: slowly, and without the products that the loss needs."""
    if dtype == torch.bfloat16 and device.type == "cuda" and not has_bfloat16(device):
        raise ValueError(
            f"{name} is bfloat16, which {torch.cuda.get_device_name(device)} ({device}) does not have: "
            "use float32, or float16 with a loss scaler"
        )


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether this GPU multiplies bfloat16."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def floats(name: str, tensor: Tensor, what: str) -> None:
    """Refuse integers, booleans and complex numbers, whose products or gradients would be no numbers of a model."""
    if tensor.dtype not in _FLOATS:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise ValueError(f"{name} is {tensor.dtype}; wanted {wanted}: pass {what}")


def _pair(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    whole_weight(f"{side}_weight", weight)
    if is_dtensor(hidden):
        raise ValueError(f"{side}_hidden is a DTensor; pass this rank's rows: {side}_hidden.to_local()")
    floats(f"{side}_hidden", hidden, "the hidden states that enter the head, not token ids")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{side}_hidden {tuple(hidden.shape)} and {side}_weight {tuple(weight.shape)} differ in width: "
            "wanted [..., width] and [vocab, width]"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{side}_bias has shape {tuple(bias.shape)}; wanted [{weight.shape[0]}], one per token id")
    if bias is not None:
        floats(f"{side}_bias", bias, "the head's bias")
    if hidden.device != weight.device:
        raise ValueError(f"{side}_hidden is on {hidden.device}, {side}_weight on {weight.device}: move one of them")


def loss_inputs(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    config: DistillConfig,
) -> None:
    """Shapes and kinds of everything `distill_loss` takes."""
    distill_config(config)
    _pair("student", student_hidden, student_weight, student_bias)
    if config.soft_weight:
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError(
                f"soft_weight is {config.soft_weight:g} but there is no teacher: pass teacher_hidden and "
                "teacher_weight, or set soft_weight=0"
            )
        teacher_pair(teacher_hidden, teacher_weight, teacher_bias, student_hidden)
    loss_targets(targets, student_hidden.shape[:-1], config)


def loss_targets(targets: Tensor | None, rows: torch.Size, config: DistillConfig) -> None:
    """Shape and dtype of the targets."""
    if targets is None:
        if config.hard_weight:
            raise ValueError(
                f"hard_weight is {config.hard_weight:g} but targets is None: pass targets, or set hard_weight=0"
            )
        return
    if targets.shape != rows:
        raise ValueError(
            f"targets {tuple(targets.shape)} do not match the rows {tuple(rows)}: targets[i] is the label of row i "
            "(shift labels first; attach() does that by itself)"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}; wanted torch.int64: targets.long()")


def loss_rows(rows: Tensor, num_rows: int) -> None:
    """Indices of rows that count, out of `num_rows`; their values only where they can be read without waiting.

    Raises:
        ValueError: no indices, out of range, or one of them twice.
    """
    if not isinstance(rows, Tensor) or rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        found = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"loss_rows is {found}; wanted the flat indices of the rows that count, an int64 tensor [n]: "
            "(shift_labels != ignore_index).flatten().nonzero().flatten()"
        )
    if not free_to_read(rows) or rows.numel() == 0:
        return
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= num_rows:
        raise ValueError(f"loss_rows has index {low if low < 0 else high}, but the rows are 0 to {num_rows - 1}")
    if rows.numel() > 1 and not bool((rows[1:] > rows[:-1]).all()) and rows.unique().numel() < rows.numel():
        raise ValueError("loss_rows lists a row twice: each row counts once; token_weights gives rows a weight")


def token_weights(weights: Tensor | None, hidden: Tensor) -> None:
    """Per-row weights: a tensor of the rows' shape."""
    if weights is not None and not isinstance(weights, Tensor):
        raise ValueError(f"token_weights is a {type(weights).__name__}; wanted a tensor {tuple(hidden.shape[:-1])}")
    if weights is not None and weights.shape != hidden.shape[:-1]:
        raise ValueError(f"token_weights {tuple(weights.shape)} do not match the rows {tuple(hidden.shape[:-1])}")


def targets_in_vocabulary(targets: Tensor, rows: Tensor, vocab_size: int) -> None:
    """Every counted label must be one of the student's `vocab_size` token ids. Reads the device back."""
    if rows.numel() == 0:
        return
    counted = targets[rows]
    low, high = torch.stack([counted.min(), counted.max()]).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"target {low if low < 0 else high} lies outside the vocabulary of {vocab_size} tokens that the "
            "student has: wrong tokenizer, or a padding label other than ignore_index?"
        )


def logits_inputs(
    student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor | None, config: DistillConfig
) -> None:
    """Shapes of everything `distill_logits` takes."""
    if config.soft_weight:
        if teacher_logits is None:
            raise ValueError(
                f"soft_weight is {config.soft_weight:g} but teacher_logits is None: pass them, or set soft_weight=0"
            )
        if teacher_logits.shape[:-1] != student_logits.shape[:-1]:
            raise ValueError(
                f"student_logits {tuple(student_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} "
                "differ in rows: both must score the same items"
            )
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if is_dtensor(logits):
            raise ValueError(f"{name} is a DTensor; pass whole rows of logits: {name}.full_tensor() or the local rows")
        if logits is not None and (config.soft_weight or name == "student_logits"):
            floats(name, logits, "what the model's head returns, not token ids or labels")
    loss_targets(targets, student_logits.shape[:-1], config)


def linear_head(name: str, head: object, *, may_be_sharded: bool = False) -> torch.nn.Linear:
    """The head if the loss can take it over: a float `nn.Linear`; a student's must not be sharded yet."""
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"{name} is a {kind}; wanted torch.nn.Linear: leave the head out of the PEFT adapter or quantisation "
            "(e.g. without lm_head in target_modules), or merge it before attach()"
        )
    weight = head.weight
    if (quantised := _quantised(weight)) is not None or _packed(head):
        raise ValueError(f"{name} is a {kind} with {quantised or 'packed'} weights: {_KEEP_OUT}")
    if may_be_sharded:
        return head
    # zero.Init partitions the weights of a model that is loaded; DeepSpeed's engine then numbers the modules too.
    if is_dtensor(weight) or (is_zero3(weight) and weight.numel() == 0 and is_in_engine(head)):
        raise ValueError(
            f"{name} is sharded already: call attach() before fully_shard or deepspeed.initialize; {_TENSOR_PARALLEL}"
        )
    return head


def _packed(head: torch.nn.Linear) -> bool:
    """Whether a weight that no wrapper has cut has other elements than its layer says; its dtype may be a float's."""
    weight = head.weight
    cut = is_dtensor(weight) or is_zero3(weight) or weight.dim() != 2 or weight.numel() == 0
    return not cut and weight.numel() != head.in_features * head.out_features


def not_tensor_parallel(name: str, head: torch.nn.Linear, model: torch.nn.Module) -> None:
    """Refuse a head cut by something else than FSDP2, which alone makes it whole for a forward."""
    if is_dtensor(head.weight) and not has_fsdp2_unit(model):
        cuts = placements_of(head.weight)
        raise ValueError(f"{name} is a DTensor ({cuts}) though the model is not under FSDP2: {_TENSOR_PARALLEL}")


def teacher_pair(
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None, student_hidden: Tensor
) -> None:
    """Teacher hidden states and head that fit the student's rows."""
    _pair("teacher", teacher_hidden, teacher_weight, teacher_bias)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden {tuple(student_hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)} "
            "differ in rows: both models must see the same tokens"
        )


def free_to_read(tensor: Tensor) -> bool:
    """Whether the host can read values of `tensor` without waiting for a device."""
    return tensor.is_cpu


def distill_config(config: object) -> DistillConfig:
    """A configuration where one is wanted."""
    if not isinstance(config, DistillConfig):
        raise ValueError(f"config is a {type(config).__name__}; wanted kd_plugin.DistillConfig(...)")
    return config


def warn_of_untrained_ids(config: DistillConfig, head: torch.nn.Module, student_size: int, teacher_size: int) -> None:
    """Warn of the token ids of the student that no loss reaches, though its head is trained."""
    if config.hard_weight or student_size <= teacher_size or make_objective(config).sorts:
        return
    if any(parameter.requires_grad for parameter in head.parameters()):
        logger.warning(
            "distill.hard_weight is 0, and the student has %d token ids, the teacher %d: nothing trains ids %d to "
            "%d, which generation samples from all the same; set hard_weight > 0, or resize the student to %d tokens",
            *(student_size, teacher_size, teacher_size, student_size - 1, teacher_size),
        )
