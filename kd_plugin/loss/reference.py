# pyright: strict
"""Ground truth: dense, unchunked, plain autograd, written from the textbook formulas.

Same signatures as the fused functions, one difference: `[tokens, vocab]` logits exist. Nothing of the loss
engine is used here, so that the two can be compared.

Token ids that only the teacher has are cut off. Where the student has more than the teacher, the hard loss is over all
of its ids and the soft loss over those of both; the metrics give the ids that the teacher lacks probability 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_plugin.divergences import registered
from kd_plugin.loss import checks
from kd_plugin.loss.output import DistillOutput, divisor
from kd_plugin.loss.split import check_items, check_soft_mask
from kd_plugin.settings.distill import sorts
from kd_plugin.settings.run import DistillConfig, TermConfig

_FLOOR = -1e5  # log-probability that stands for zero: 0 * _FLOOR is 0 where 0 * -inf is NaN


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).clamp_min(_FLOOR)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probabilities `[N, V]` -> `[N]`."""
    return (first.exp() * (first - second)).sum(-1)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log((1 - share) * exp(first) + share * exp(second))."""
    weights = torch.tensor([1 - share, share], dtype=first.dtype, device=first.device).log()
    return torch.logaddexp(weights[0] + first, weights[1] + second)


def _distance(name: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The distance of the logits themselves, over the tokens that neither side masks with -inf."""
    both = student_logits.isfinite() & teacher_logits.isfinite()
    z, v = (torch.where(both, logits, 0.0) for logits in (student_logits, teacher_logits))
    if name == "cosine":
        return 1 - F.cosine_similarity(z, v, dim=-1)
    difference = z - v
    if name == "logit_mse_centered":
        mean = difference.sum(-1, keepdim=True) / both.sum(-1, keepdim=True)
        difference = torch.where(both, difference - mean, 0.0)
    return 0.5 * difference.square().sum(-1)


def _sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    width = max(q.shape[-1], p.shape[-1])
    padded = [F.pad(x.exp(), (0, width - x.shape[-1])).sort(-1, descending=True).values for x in (q, p)]
    return (padded[0] - padded[1]).abs().sum(-1)


def divergence(name: str, student_logits: Tensor, teacher_logits: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Value of each row `[N]`, of logits `[N, V]` already divided by the temperature."""
    if name in ("logit_mse", "logit_mse_centered", "cosine"):
        return _distance(name, student_logits, teacher_logits)
    q, p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    match name:
        case "forward_kl":
            return _kl(p, q)
        case "soft_ce":
            return -(p.exp() * q).sum(-1)
        case "reverse_kl":
            return _kl(q, p)
        case "jsd":
            m = _mixture(q, p, beta)
            return beta * _kl(p, m) + (1 - beta) * _kl(q, m)
        case "skew_kl":
            return _kl(p, _mixture(q, p, alpha))
        case "skew_reverse_kl":
            return _kl(q, _mixture(p, q, alpha))
        case "tvd":
            return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
        case "acceptance":
            return -torch.minimum(p.exp(), q.exp()).sum(-1).log()
        case "uld":
            return _sorted_distance(q, p)
        case _:
            return registered.value(name, q, p).sum(-1)


def _soft_loss(student_logits: Tensor, teacher_logits: Tensor, config: DistillConfig) -> Tensor:
    total = student_logits.new_zeros(student_logits.shape[0])
    for term in config.terms or (TermConfig(name=config.divergence),):
        temperature = term.temperature or config.temperature
        value = divergence(
            term.name,
            student_logits / temperature,
            teacher_logits / temperature,
            beta=term.beta or config.beta,
            alpha=term.alpha or config.alpha,
        )
        total = total + term.weight * temperature**config.temperature_power * value
    return total


def _hard(student_logits: Tensor, targets: Tensor, config: DistillConfig) -> Tensor:
    loss = F.cross_entropy(student_logits, targets, reduction="none", label_smoothing=config.label_smoothing)
    return loss + config.z_loss_weight * torch.logsumexp(student_logits, -1).square()


def _sorts(config: DistillConfig) -> bool:
    return any(map(sorts, [config.divergence, *(term.name for term in config.terms or ())]))


def _output(
    student_logits: Tensor,  # [N, V], valid rows, fp32 or wider
    teacher_logits: Tensor | None,  # [N, V'], V' <= V unless the objective sorts
    targets: Tensor | None,  # [N]
    weights: Tensor | None,  # [N]
    config: DistillConfig,
    num_items: int | float | Tensor | None,
) -> DistillOutput:
    rows = student_logits.shape[0]
    items = divisor(num_items, rows)
    if targets is not None:
        every = torch.arange(rows, device=targets.device)
        checks.targets_in_vocabulary(targets, every, student_logits.shape[-1])
    soft = hard = torch.where(student_logits.isfinite(), student_logits, 0.0).sum(-1) * 0.0  # a graph, and 0
    metrics = {}
    if config.soft_weight:
        assert teacher_logits is not None
        shared = None if _sorts(config) else teacher_logits.shape[-1]
        soft = _soft_loss(student_logits[:, :shared], teacher_logits, config)
        if config.metrics:
            metrics = _metrics(student_logits.detach(), teacher_logits.detach(), _sorts(config))
    if config.hard_weight:
        assert targets is not None
        hard = _hard(student_logits, targets, config)
    if weights is not None:
        soft, hard = soft * weights, hard * weights
    soft_loss, hard_loss = soft.sum() / items, hard.sum() / items
    loss = config.soft_weight * soft_loss + config.hard_weight * hard_loss
    num_valid = torch.tensor(rows, device=student_logits.device)
    return DistillOutput(loss, soft_loss.detach(), hard_loss.detach(), num_valid, metrics)


def _metrics(student_logits: Tensor, teacher_logits: Tensor, sorts: bool) -> dict[str, Tensor]:
    q, p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    if not sorts:
        p = F.pad(p, (0, q.shape[-1] - p.shape[-1]), value=_FLOOR)
    per_row = {"teacher_entropy": -(p.exp() * p).sum(-1), "student_entropy": -(q.exp() * q).sum(-1)}
    if not sorts:  # otherwise token ids do not correspond
        per_row["top1_agreement"] = (p.argmax(-1) == q.argmax(-1)).to(q.dtype)
        per_row["acceptance_rate"] = torch.minimum(p.exp(), q.exp()).sum(-1)
        per_row["kl_t1"] = _kl(p, q)
    return {name: values.sum() / max(values.shape[0], 1) for name, values in per_row.items()}


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in the dtype of `hidden`, of operands that are rounded where autocast would round them."""
    wide, device_type, operands = hidden.dtype, hidden.device.type, [hidden, weight.to(hidden.dtype)]
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (wide, weight.dtype):
        dtype = torch.get_autocast_dtype(device_type)
        operands = [x + (x.to(dtype).to(wide) - x).detach() for x in operands]
    with torch.autocast(device_type, enabled=False):
        return F.linear(operands[0], operands[1], bias)


def distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    *,
    config: DistillConfig,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    soft_mask: Tensor | None = None,
    soft_items: int | float | Tensor | None = None,
) -> DistillOutput:
    """As `kd_plugin.distill_loss`, dense. Half-precision inputs, or what autocast rounds, are multiplied in fp32."""
    models = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    checks.loss_inputs(*models, targets, student_bias, teacher_bias, config)
    checks.token_weights(token_weights, student_hidden)
    check_soft_mask(soft_mask, targets, student_hidden.shape[:-1], config)
    check_items(num_items, soft_items, splits=soft_mask is not None)
    if soft_mask is not None:
        biases = {"student_bias": student_bias, "teacher_bias": teacher_bias}
        return _split(models, targets, soft_mask, config, num_items, soft_items, token_weights=token_weights, **biases)
    rows = slice(None) if targets is None else targets.reshape(-1) != config.ignore_index

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int | None = None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        flat = hidden.reshape(-1, hidden.shape[-1])[rows].to(wide)
        bias = None if bias is None else bias[:columns].to(wide)
        return _linear(flat, weight[:columns], bias)

    teacher_logits = None
    if config.soft_weight:
        assert teacher_hidden is not None and teacher_weight is not None
        with torch.no_grad():
            columns = None if _sorts(config) else student_weight.shape[0]
            teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias, columns)
    flat_targets = None if targets is None else targets.reshape(-1)[rows]
    weights = None if token_weights is None else token_weights.reshape(-1)[rows]
    student_logits = logits(student_hidden, student_weight, student_bias)
    return _output(student_logits, teacher_logits, flat_targets, weights, config, num_items)


def _split(
    models: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    targets: Tensor | None,
    soft_mask: Tensor,
    config: DistillConfig,
    num_items: int | float | Tensor | None,
    soft_items: int | float | Tensor | None,
    **options: Tensor | None,
) -> DistillOutput:
    """The two losses one by one, each on its own rows."""
    alone = {"soft_on": "trained", "label_smoothing": 0.0, "z_loss_weight": 0.0, "hard_weight": 0.0}
    ids = torch.where(soft_mask, torch.zeros_like(soft_mask, dtype=torch.int64), config.ignore_index)
    of_soft, of_hard = config.model_copy(update=alone), config.model_copy(update={"soft_weight": 0.0})
    found = distill_loss(*models, ids, config=of_soft, num_items=soft_items, **options)
    if targets is None:
        return found
    hard = distill_loss(*models, targets, config=of_hard, num_items=num_items, **options)
    counted = soft_mask | (targets != config.ignore_index)
    return found._replace(loss=found.loss + hard.loss, hard_loss=hard.hard_loss, num_valid=counted.sum())


def distill_logits(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None = None,
    *,
    config: DistillConfig,
    detach_teacher: bool = True,
    num_items: int | float | Tensor | None = None,
) -> DistillOutput:
    """As `kd_plugin.distill_logits`, plain autograd; `detach_teacher=False` lets gradients into both."""
    checks.distill_config(config)
    checks.logits_inputs(student_logits, teacher_logits, targets, config)
    rows = slice(None) if targets is None else targets.reshape(-1) != config.ignore_index
    columns = None if _sorts(config) else student_logits.shape[-1]

    def flat(logits: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits.reshape(-1, logits.shape[-1])[rows, :columns].to(wide)

    teacher = None
    if config.soft_weight:
        assert teacher_logits is not None
        teacher = flat(teacher_logits.detach() if detach_teacher else teacher_logits)
    flat_targets = None if targets is None else targets.reshape(-1)[rows]
    return _output(flat(student_logits), teacher, flat_targets, None, config, num_items)
