"""One row of the sweep: is an attached student equal to the model's own logits and loss, or refused by name?

A row is a class, or a variant of one. The verdicts are `equal`, `refused`, `cannot be built`, and `mismatch`: a fault.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests.sweep import conventions, dense
from tests.sweep.batches import batch_for
from tests.sweep.heads import head_facts
from tests.sweep.shrink import small_model
from tests.sweep.special import VARIANTS

SOFT, HARD, TEMPERATURE = 0.6, 0.4, 1.5
TOLERANCE = 2e-4
"""Of losses and gradients in fp32, relative to the larger of 1 and the loss, and to each gradient's largest value."""
FLOOR = 1e-2
"""A gradient below this share of the largest one of all is judged as if it were so large."""


class Verdict(NamedTuple):
    """Of one row. `reason` is our message, an exception, or what differs."""

    verdict: str
    reason: str = ""


class Case(NamedTuple):
    """Two small models, their batch and the batch's label convention."""

    student: nn.Module
    teacher: nn.Module
    batch: dict[str, Any]
    convention: str
    note: str


def make_case(row: str) -> Case:
    """The case of a row. Raises whatever the class or its forward raises where it cannot be built small."""
    name, changes = VARIANTS.get(row, (row, {}))
    student, teacher = small_model(name, 1, changes), small_model(name, 2, changes)
    teacher.eval()  # some compute otherwise in training, and a teacher is never trained
    for model in (student, teacher):
        model.register_forward_pre_hook(_same_random_numbers)
    batch = batch_for(student)
    logits = dense.run(student.train(), batch).get("logits")
    if not isinstance(logits, Tensor):
        raise ValueError(f"{name} gives no logits")
    if logits.isnan().any():
        raise ValueError(f"the logits of a small {name} are not finite")
    return Case(student, teacher, batch, *conventions.label_convention(student, batch))


def _same_random_numbers(*_: Any) -> None:
    """Some models draw in their forward: hashes, jitter of a router."""
    torch.manual_seed(0)


def facts_of(case: Case) -> dict[str, Any]:
    """What the class does with labels, decoder inputs and logits."""
    student, batch = case.student, case.batch
    facts = {"labels": case.convention, "note": case.note, "decoder_inputs": conventions.decoder_inputs(student, batch)}
    facts["leaves_out_masked"] = conventions.leaves_out_masked(student, batch)
    adds = abs(conventions.added_loss(student, batch)) > 1e-6
    return {**facts, "adds_router_loss": adds, **head_facts(student, batch)}


def verdict_of(row: str) -> Verdict:
    """The verdict of a row."""
    try:
        case = make_case(row)
    except Exception as error:
        return Verdict("cannot be built", one_line(error))
    return judge(case)


def judge(case: Case, late: bool = False) -> Verdict:
    """Compare with a teacher, then without one, against the dense values.

    `late`: both models are on the meta device when they are attached, and their weights come afterwards.
    """
    try:
        wanted = _dense(case) if case.convention in dense.CONVENTIONS else None
        own = _own(case) if wanted else None
    except RuntimeError as error:
        return Verdict("cannot be built", one_line(error))
    try:
        loss, found = _attached(case, case.teacher, late, soft_weight=SOFT, hard_weight=HARD)
        if wanted is None:
            return Verdict("mismatch", f"accepted with loss {float(loss):.5f}, though labels are {case.convention}")
        first = _difference("loss", loss, wanted[0], found, wanted[1])
        if first.verdict != "equal":
            return first
        loss, found = _attached(case, None, late, soft_weight=0.0, hard_weight=1.0)
        assert own is not None
    except Exception as error:
        return _refusal(error)
    return _difference("own loss", loss, own[0], found, own[1])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name, of the parameters that the loss reaches."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _dense(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    rows, labels = dense.CONVENTIONS[case.convention], case.batch["labels"]
    with torch.no_grad():
        # As in training: with a cache, T5Gemma in eval mode leaves its decoder's padding unmasked
        cached = "use_cache" in inspect.signature(type(case.teacher).forward).parameters
        read = {**case.batch, "use_cache": False} if cached else case.batch
        teachers = rows(dense.run(case.teacher, read).logits, labels)
    output = dense.run(case.student, case.batch)
    students = rows(output.logits, labels)
    hard = dense.cross_entropy(students)
    added = output.loss - hard  # a router's loss; otherwise rounding
    wanted = SOFT * dense.forward_kl(students, teachers, TEMPERATURE).float() + HARD * hard + added
    return wanted.detach(), gradients(case.student, wanted)


def _own(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    loss = dense.run(case.student, case.batch).loss
    return loss.detach(), gradients(case.student, loss)


def _attached(case: Case, teacher: nn.Module | None, late: bool, **weights: float) -> tuple[Tensor, dict[str, Tensor]]:
    config = kd.DistillConfig(temperature=TEMPERATURE, row_kernel="eager", chunk_size=8, **weights)
    models = [model for model in (case.student, teacher) if model is not None]
    bring_back = [_without_weights(model) for model in models] if late else []
    plugin = None
    try:
        plugin = kd.attach(case.student, teacher, config)
        while bring_back:
            bring_back.pop()()
        loss = case.student(**case.batch).loss
        return loss.detach(), gradients(case.student, loss)
    finally:
        if plugin is not None:
            plugin.detach()
        for act in bring_back:
            act()


def _without_weights(model: nn.Module) -> Callable[[], None]:
    """Put a model on the meta device -> what brings its weights back, as deferred initialisation does."""
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    model.to("meta")

    def bring_back() -> None:
        model.to_empty(device="cpu")
        with torch.no_grad():
            for name, tensor in _tensors(model):
                tensor.copy_(kept[name])
        model.tie_weights()

    return bring_back


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _difference(what: str, loss: Tensor, wanted: Tensor, found: dict[str, Tensor], grads: dict[str, Tensor]) -> Verdict:
    if not abs(float(loss) - float(wanted)) <= TOLERANCE * max(1.0, abs(float(wanted))):
        return Verdict("mismatch", f"{what} {float(loss):.5f}, wanted {float(wanted):.5f}")
    largest = max((float(gradient.abs().max()) for gradient in grads.values()), default=0.0)
    if not largest > 0:
        return Verdict("mismatch", f"{what}: no gradient reaches any parameter")
    for name in sorted(grads.keys() | found.keys()):
        ours, theirs = found.get(name), grads.get(name)
        difference = (0 if ours is None else ours) - (0 if theirs is None else theirs)
        size = 0.0 if theirs is None else float(theirs.abs().max())
        if not float(difference.abs().max()) <= TOLERANCE * max(size, FLOOR * largest):
            return Verdict("mismatch", f"{what}: gradient of {name} is off by {float(difference.abs().max()):.2e}")
    return Verdict("equal")


def _refusal(error: Exception) -> Verdict:
    """Ours if it is a ValueError that our code raised; anything else is a crash."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError) and "kd_plugin" in last.filename.split("/"):
        return Verdict("refused", one_line(error).partition(": ")[2])
    return Verdict("mismatch", f"crash: {one_line(error)} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})")


def one_line(error: BaseException) -> str:
    """Kind and message of an exception, at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
