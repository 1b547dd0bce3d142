"""Dense fp64 oracle of the loss, written from the textbook formulas row by row; shares no code with kd_plugin.

Probabilities are formed and summed as the formulas say, and gradients come from autograd in fp64. It is slow and
holds everything, which is what an oracle may do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd")
ALL_DIVERGENCES = (
    *DIVERGENCES,
    *("skew_kl", "skew_reverse_kl", "tvd", "acceptance", "logit_mse", "logit_mse_centered", "cosine", "uld"),
)


@dataclass
class Expected:
    """What a loss call should give; `loss` is differentiable."""

    loss: Tensor
    soft: float
    hard: float
    num_valid: int
    metrics: dict[str, float] = field(default_factory=dict)


def log_probs(logits: Tensor) -> Tensor:
    """`[..., V]` -> log-probabilities."""
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def _expectation(weights: Tensor, values: Tensor) -> Tensor:
    """sum weights * values over the vocabulary, where 0 times anything is 0."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum(-1)


def _log(mixture: Tensor) -> Tensor:
    """Logarithm of what is positive; the rest counts for nothing, and must not turn gradients into NaN."""
    return torch.where(mixture > 0, mixture, 1.0).log()


def divergence(name: str, student: Tensor, teacher: Tensor, beta: float = 0.5, alpha: float = 0.1) -> Tensor:
    """Logits `[..., V]` already divided by the temperature -> values `[...]`. q is the student, p the teacher."""
    log_q, log_p = log_probs(student), log_probs(teacher)
    q, p = log_q.exp(), log_p.exp()
    if name == "forward_kl":
        return _expectation(p, log_p - log_q)
    if name == "soft_ce":
        return _expectation(p, -log_q)
    if name == "reverse_kl":
        return _expectation(q, log_q - log_p)
    if name == "jsd":
        log_m = _log(beta * p + (1 - beta) * q)
        return beta * _expectation(p, log_p - log_m) + (1 - beta) * _expectation(q, log_q - log_m)
    if name == "skew_kl":
        return _expectation(p, log_p - _log(alpha * p + (1 - alpha) * q))
    if name == "skew_reverse_kl":
        return _expectation(q, log_q - _log((1 - alpha) * p + alpha * q))
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    if name == "acceptance":
        return -torch.minimum(p, q).sum(-1).log()
    if name == "uld":
        return sorted_distance(q, p)
    return _distance_of_logits(name, student, teacher)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """sum |sort q - sort p|, the smaller vocabulary filled up with tokens of probability zero."""
    wide = max(q.shape[-1], p.shape[-1])
    tall = [torch.cat([x, x.new_zeros(*x.shape[:-1], wide - x.shape[-1])], -1).sort(-1).values for x in (q, p)]
    return (tall[0] - tall[1]).abs().sum(-1)


def _distance_of_logits(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Over the tokens that neither side masks with -inf."""
    both = student.isfinite() & teacher.isfinite()
    s, t = torch.where(both, student, 0.0), torch.where(both, teacher, 0.0)
    if name == "logit_mse":
        return ((s - t) ** 2).sum(-1) / 2
    if name == "cosine":
        return 1 - (s * t).sum(-1) / ((s * s).sum(-1).sqrt() * (t * t).sum(-1).sqrt())
    if name == "logit_mse_centered":
        count = both.sum(-1, keepdim=True)
        s, t = s - s.sum(-1, keepdim=True) / count, t - t.sum(-1, keepdim=True) / count
        return torch.where(both, (s - t) ** 2, 0.0).sum(-1) / 2
    raise NotImplementedError(name)


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0, z_loss_weight: float = 0.0) -> Tensor:
    """One row `[V]`: towards (1 - smoothing) onehot + smoothing / V, plus the weighted squared log-normaliser."""
    log_q = log_probs(logits)
    value = -(1 - smoothing) * log_q[target] - smoothing * log_q.mean()
    return value + z_loss_weight * torch.logsumexp(logits, dim=-1) ** 2


def soft_loss(student: Tensor, teacher: Tensor, config: Any) -> Tensor:
    """One row of logits `[V]` and `[V']` -> sum of the configured divergences."""
    terms = config.terms or [SimpleNamespace(name=config.divergence, weight=1, temperature=None, beta=None, alpha=None)]
    total = student.new_zeros(())
    for term in terms:
        temperature = config.temperature if term.temperature is None else term.temperature
        beta = config.beta if term.beta is None else term.beta
        alpha = config.alpha if term.alpha is None else term.alpha
        value = divergence(term.name, student / temperature, teacher / temperature, beta, alpha)
        total = total + term.weight * temperature**config.temperature_power * value
    return total


def measurements(student: Tensor, teacher: Tensor, sorts: bool = False) -> dict[str, Tensor]:
    """One row's metrics, at temperature 1; where ids do not correspond only the entropies mean anything.

    Both distributions are whole: the teacher gives an id that it lacks the probability 0, and so does the student.
    """
    if not sorts:
        size = max(len(student), len(teacher))
        student, teacher = (F.pad(z, (0, size - len(z)), value=-math.inf) for z in (student, teacher))
    log_q, log_p = log_probs(student), log_probs(teacher)
    q, p = log_q.exp(), log_p.exp()
    entropies = {"teacher_entropy": _expectation(p, -log_p), "student_entropy": _expectation(q, -log_q)}
    if sorts:
        return entropies
    return {
        **entropies,
        "top1_agreement": (q.argmax() == p.argmax()).double(),
        "acceptance_rate": 1 - (q - p).abs().sum() / 2,
        "kl_t1": _expectation(p, log_p - log_q),
    }


def distill_logits(
    student: Tensor,  # [N, V]
    teacher: Tensor | None,  # [N, V']
    targets: Tensor | None,  # [N]
    config: Any,
    *,
    num_items: float | None = None,
    token_weights: Tensor | None = None,  # [N]
    soft_mask: Tensor | None = None,  # [N], rows of the soft loss; None: those with a label
    soft_items: float | None = None,
) -> Expected:
    """The objective of `config` on logits, in fp64: the hard loss over all of the student's columns, the soft loss
    over those that both have. Columns that only the teacher has do not exist."""
    student = student.double()
    shared = student.shape[1]
    sorts = "uld" in ([term.name for term in config.terms] if config.terms else [config.divergence])
    if config.soft_weight:
        assert teacher is not None
        teacher = teacher.detach().double()
        if not sorts:
            teacher = teacher[:, :shared]
            shared = teacher.shape[1]
    rows = [i for i in range(len(student)) if targets is None or int(targets[i]) != config.ignore_index]
    scored = rows if soft_mask is None else [i for i in range(len(student)) if soft_mask[i]]
    soft = hard = student.new_zeros(())
    sums: dict[str, Tensor] = {}
    weights = [1.0] * len(student) if token_weights is None else token_weights.double()
    for i in scored if config.soft_weight else ():
        soft = soft + weights[i] * soft_loss(student[i][:shared], teacher[i], config)
        for name, measured in measurements(student[i].detach(), teacher[i], sorts).items():
            sums[name] = sums.get(name, 0.0) + measured
    for i in rows if config.hard_weight else ():
        value = cross_entropy(student[i], targets[i], config.label_smoothing, config.z_loss_weight)
        hard = hard + weights[i] * value
    items = max(len(rows), 1) if num_items is None else num_items
    if soft_mask is None:
        soft_items = items
    elif soft_items is None:
        soft_items = max(len(scored), 1)
    soft, hard = soft / soft_items, hard / items
    loss = config.soft_weight * soft + config.hard_weight * hard
    counted = {*rows, *scored}
    if not counted:
        loss = loss + 0.0 * student[:0].sum()
    metrics = {name: total.item() / len(scored) for name, total in sums.items()}
    return Expected(loss, soft.item(), hard.item(), len(counted), metrics)


@dataclass
class Problem:
    """Inputs of `distill_loss` with odd sizes; `tensors()` in order, `leaves` those that want gradients."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, E]
    teacher_weight: Tensor  # [V', E]
    targets: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    teacher_bias: Tensor | None = None  # [V']

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.targets))

    @property
    def leaves(self) -> list[Tensor]:
        """Whatever requires a gradient among hidden, weight and bias."""
        tensors = (self.hidden, self.weight, self.bias)
        return [t for t in tensors if t is not None and t.requires_grad]

    def exact(self) -> Problem:
        """The same values with leaves in fp64: autograd rounds a gradient to the precision of its leaf."""
        tensors = (self.hidden, self.weight, self.bias)
        wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        return replace(self, hidden=wide[0], weight=wide[1], bias=wide[2])

    @property
    def biases(self) -> dict[str, Tensor]:
        """Keyword arguments of `distill_loss`."""
        pairs = (("student_bias", self.bias), ("teacher_bias", self.teacher_bias))
        return {name: bias for name, bias in pairs if bias is not None}

    def expected(self, config: Any, **options: Any) -> Expected:
        """The expected results of the inputs as they are, upcast; use `gradients` on its loss."""
        student = self.hidden.double() @ self.weight.double().T
        teacher = self.teacher_hidden.double() @ self.teacher_weight.double().T
        if self.bias is not None:
            student = student + self.bias.double()
        if self.teacher_bias is not None:
            teacher = teacher + self.teacher_bias.double()
        return distill_logits(student, teacher, self.targets, config, **options)


def make_problem(
    rows: int = 13,
    width: int = 5,
    teacher_width: int = 7,
    vocab: int = 11,
    teacher_vocab: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    ignored: tuple[int, ...] = (1, 5, 6, 12),
    bias: bool = False,
    seed: int = 0,
) -> Problem:
    """Random signed inputs; the label of every row in `ignored` is -100, the others are any ids of the student."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[list(ignored)] = -100
    problem = Problem(
        normal(rows, width).requires_grad_(),
        normal(vocab, width).requires_grad_(),
        normal(rows, teacher_width),
        normal(teacher_vocab or vocab, teacher_width),
        targets,
    )
    if bias:
        problem.bias = normal(vocab).requires_grad_()
        problem.teacher_bias = normal(teacher_vocab or vocab)
    return problem


def gradients(loss: Tensor, leaves: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Of `scale * loss`, as `loss.backward(scale)` would leave them."""
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; absolute where the wanted value is zero."""
    difference = (found.double() - wanted.double()).norm()
    size = wanted.double().norm()
    return float(difference / size if size > 0 else difference)


def chunk_sizes(rows: int) -> list[int]:
    """Sizes that divide `rows`, that do not, that leave one row over, and that hold all."""
    return sorted({1, 3, 4, rows - 1, rows, rows + 50})
