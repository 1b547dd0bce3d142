"""The steps of a run: train, measure, evaluate, save; written against the engine protocol.

Notable decisions:
- a logged number is about all tokens since the last log line, over all ranks and micro-batches;
- the last step, and each step that is evaluated, is logged too, so that evaluation never swallows a window;
- evaluation is at temperature 1 with every measurement on, whatever the run optimises.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from kd_plugin.data.batch import Batch
from kd_plugin.distributed.bars import bar, said_if_slow
from kd_plugin.distributed.collectives import named_in_wrapper
from kd_plugin.divergences.measures import MEASURED
from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.plugin.soft_rows import soft_items_of
from kd_plugin.row_kernels import dispatch
from kd_plugin.settings.run import DistillConfig, RunConfig
from kd_plugin.training import checkpoint
from kd_plugin.training.console import eval_line, progress, step_line
from kd_plugin.training.finite import CHECK_EVERY, DivergedError, FiniteWatch, has_finite_parameters, scales_loss
from kd_plugin.training.memory import memory_readings
from kd_plugin.training.schedule import learning_rate_at
from kd_plugin.training.session import Session
from kd_plugin.training.tensorboard import evaluated, tagged

__all__ = ["evaluate", "run_steps"]

logger = logging.getLogger(__name__)


class _Window:
    """The steps since the last logged one, and the time that they took."""

    def __init__(self) -> None:
        self.steps = 0
        self.start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the body out."""
        pause = time.perf_counter()
        yield
        self.start += time.perf_counter() - pause


def run_steps(session: Session, first: int, before: dict[str, float]) -> dict[str, float]:
    """Run the steps `first` to `max_steps`; returns the last evaluation (`before` when nothing is left to do).

    Raises:
        DivergedError: on all ranks, a few steps after a loss or a gradient that is not a number.
    """
    train = session.config.train
    session.plugin.metrics()  # the window starts here
    started, window = time.perf_counter(), _Window()
    result, finite = before, FiniteWatch(scaled=scales_loss(session.config))
    for step in progress(first, train.max_steps):
        with named_in_wrapper(f"in step {step}"), _compiling(session, first=step == first):
            loss, gradient_norm = _train_step(session, step)
            finite.add(step, loss, gradient_norm)
        window.steps += 1
        evaluates, logs, saves = _due(session.config, step)
        if logs:
            values = _measure(session, step, gradient_norm, window)
            eta = (time.perf_counter() - started) / (step - first + 1) * (train.max_steps - step)
            _log(session, step, values, eta)
            window = _Window()
        if logs or saves or step % CHECK_EVERY == 0:
            # Waits for the device: the step's own work is over, what follows is no part of its time
            _stop_if_broken(session, finite, step, loss, gradient_norm)
        with window.paused():
            if evaluates:
                result = evaluate(session, step)
                session.best.look(session.engine, step, result)
            if saves:
                _save(session, step)
        if evaluates and session.early_stop.ends(step, result):
            break
    return result


def _compiling(session: Session, *, first: bool) -> AbstractContextManager[None]:
    """Says that the loss is being compiled where its first run takes long."""
    if not first:
        return nullcontext()
    kernel = dispatch.choose(session.config.distill.row_kernel, session.place.device.type)
    if kernel == "eager":
        return nullcontext()
    return said_if_slow(f"distill.row_kernel {kernel}: compiling the loss as it first runs, a minute or two")


def _due(config: RunConfig, step: int) -> tuple[bool, bool, bool]:
    """Whether `step` is followed by an evaluation, by a log line, and by a checkpoint."""
    train = config.train
    evaluated = step == train.max_steps or (train.eval_every > 0 and step % train.eval_every == 0)
    saved = train.save_every > 0 and step % train.save_every == 0
    return evaluated, evaluated or step % config.log.every == 0, saved


def _number(norm: Tensor | None) -> float:
    return math.nan if norm is None else norm.item()


def _stop_if_broken(
    session: Session, finite: FiniteWatch, step: int, loss: Tensor, gradient_norm: Tensor | None
) -> None:
    """Raise DivergedError on all ranks if the student has broken in one of the last steps. One collective."""
    if first := finite.first_broken_step():
        _stop(session, f"at step {first} (step {step}: loss {loss.item()}, gradient norm {_number(gradient_norm)})")


def _stop(session: Session, what: str) -> None:
    train, folder = session.config.train, checkpoint.latest_finite(Path(session.config.log.output_dir))
    cure = "lower train.learning_rate, or raise train.warmup_steps"
    cure += ", or use bfloat16" if scales_loss(session.config) else ""
    if folder is not None:
        left = f"the last finite checkpoint is {folder}, from which train.resume=true goes on"
    else:
        left = "there is no checkpoint" + ("" if train.save_every else " (train.save_every is 0)")
    raise DivergedError(f"training diverged {what}; nothing was exported, nor saved since: {cure}; {left}")


def _is_sound(session: Session) -> bool:
    """Whether the student's weights are finite and give a loss. All ranks call this; no metric is touched."""
    batch, engine = next(session.held_out()), session.engine
    with session.plugin.unmeasured(), session.evaluating():
        loss = _evaluate(session, batch)
    broken = reduce_numbers({"losses that are not finite": float(loss.isnan())}, op="max").popitem()[1]
    return not broken and has_finite_parameters(engine.student, engine.torch_optimizer)


def _save(session: Session, step: int) -> None:
    with session.timed("save"):
        if not _is_sound(session):
            _stop(session, f"at step {step}: its update left weights that are not finite, or too large for a loss")
        settled = {"chunk_size": session.plugin.chunk_size, "together": session.pace.together}
        folder = checkpoint.save(session.engine, session.config, mode=session.mode, step=step, **settled)
    logger.info("checkpoint %s", folder)


def _train_step(session: Session, step: int) -> tuple[Tensor, Tensor | None]:
    """Take one optimizer step; returns this rank's loss and the gradient norm, if it is known, 0-d on the device."""
    engine = session.engine
    batches = session.batches.step(step - 1)
    # One count for the whole step: tokens weigh the same wherever they fall.
    own = {"trained": sum(b.num_trained for b in batches), "valid": sum(b.num_valid for b in batches)}
    trained, valid = (max(1, int(number)) for number in reduce_numbers(own).values())
    soft_items = soft_items_of(session.config.distill, valid)
    loss = torch.zeros((), device=session.place.device)
    moved = (batch.to(session.place.device, non_blocking=True) for batch in batches)
    micro_batches = [batch.model_inputs() | soft_items for batch in moved]
    session.pace.run_ahead(micro_batches)
    for index, inputs in enumerate(micro_batches):
        loss += engine.forward_backward(inputs, num_items=trained, is_last=index == len(batches) - 1)
    return loss, engine.step(learning_rate_at(step, session.config.train))


def _measure(session: Session, step: int, gradient_norm: Tensor | None, window: _Window) -> dict[str, float]:
    """All numbers of the window that ends with this step. All ranks call this."""
    train, distill = session.config.train, session.config.distill
    norm = _number(gradient_norm)  # waits for the device, so that the window's time is the window's
    elapsed = time.perf_counter() - window.start
    values = session.plugin.metrics()
    for name, weight in (("soft_loss", distill.soft_weight), ("hard_loss", distill.hard_weight)):
        if not weight:
            values.pop(name, None)  # not computed, so its 0 says nothing
    session.memory = memory = reduce_numbers(memory_readings(), op="max")
    tokens = session.batches.sequences_per_step * session.batches.dataset.seq_len * window.steps
    values |= memory | {
        "lr": learning_rate_at(step, train),
        "grad_norm": norm,
        "step_time_ms": 1e3 * elapsed / window.steps,
        "tokens_per_second": tokens / elapsed,
        "memory_gib": next(iter(memory.values())),
    }
    _split_time(session, values, elapsed, window.steps)
    return values


def _split_time(session: Session, values: dict[str, float], elapsed: float, steps: int) -> None:
    """Turn the times of a window of `steps` into times per step; the student's is the rest, backward included."""
    values.pop("student_ms", None)  # of its forward alone
    parts = {name: values.get(f"{name}_ms", 0.0) / steps for name in ("teacher", "loss")}
    parts["student"] = max(0.0, 1e3 * elapsed / steps - sum(parts.values()))
    for name, milliseconds in parts.items():
        values[f"{name}_ms"] = milliseconds
        session.seconds[name] = session.seconds.get(name, 0.0) + milliseconds * steps / 1e3


def _log(session: Session, step: int, values: dict[str, float], eta_s: float) -> None:
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        logger.warning("step %d: loss %s, gradient norm %s", step, values["loss"], values["grad_norm"])
    session.history.append({"step": step, **values})
    session.writer.scalars(step, tagged(values))
    logger.info("%s", step_line(step, session.config.train.max_steps, values, eta_s=eta_s))


def _plain(config: DistillConfig) -> DistillConfig:
    """The objective of an evaluation: the divergences of `config` at temperature 1, and the plain cross-entropy."""
    # A term's own temperature goes before the objective's.
    terms = config.terms and tuple(term.model_copy(update={"temperature": 1.0}) for term in config.terms)
    neutral = {"temperature": 1.0, "hard_weight": 1.0, "label_smoothing": 0.0, "z_loss_weight": 0.0}
    return config.model_copy(update={**neutral, "terms": terms, "metrics": True})


def evaluate(session: Session, step: int) -> dict[str, float]:
    """Measure held-out perplexity, losses at temperature 1 and agreement, over all ranks. All ranks call this."""
    compiling = _compiling(session, first=not session.history)
    with session.timed("eval"), compiling, session.plugin.objective(_plain(session.config.distill)):
        measured = _run_held_out(session)
    # Without a teacher there is no soft loss, and 0 would read as a perfect match
    losses = ("hard_loss", "soft_loss") if session.config.distill.soft_weight else ("hard_loss",)
    names = (*losses, *MEASURED)
    values = {name: measured[name] for name in names if name in measured}
    values["perplexity"] = math.exp(min(values["hard_loss"], 700.0))  # beyond, a float would overflow
    session.writer.scalars(step, evaluated(values))
    logger.info("%s", eval_line(step, values))
    return values


def _run_held_out(session: Session) -> dict[str, float]:
    """Run the student over the held-out sequences; returns what the plugin has measured."""
    with session.evaluating():
        for batch in bar(session.held_out(), what="evaluation", unit="batch", total=session.num_held_out):
            _evaluate(session, batch)
        return session.plugin.metrics()


def _evaluate(session: Session, batch: Batch) -> Tensor:
    """The loss (0-d) of one held-out micro-batch, the mean over its own tokens."""
    soft_items = soft_items_of(session.config.distill, max(1, batch.num_valid))
    inputs = batch.to(session.place.device, non_blocking=True).model_inputs() | soft_items
    return session.engine.evaluate(inputs, num_items=max(1, batch.num_trained))
