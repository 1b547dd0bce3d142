"""At the start of a run with packed documents: which way keeps them apart in each model, seen in its hidden states.

Notable decisions:
- the real models on their devices are asked, under their wrappers and with their attention backend, by a few short
  forwards that all ranks run: one document of each sequence is changed, and the hidden states of all others have to
  stay. They also have to be those of each document alone, which a wrong position or a lost window would change;
- how much is too much is measured as well: by what the same change does where documents are joined. What rounding
  alone does (other routes of a mixture of experts, other kernels) is below a fixed floor;
- a model for which no way is found is refused by name. Nothing is joined without being asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd_plugin.engines.process_group import reduce_numbers
from kd_plugin.engines.protocol import DTYPES
from kd_plugin.engines.zero_block import uses_autocast
from kd_plugin.plugin.isolation import Way, attention_of, recurrent_layers, ways_of, windows_of
from kd_plugin.plugin.soft_rows import soft_items_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kd_plugin.training.session import Session

__all__ = ["IsolationError", "isolate_documents"]

logger = logging.getLogger(__name__)

_FIRST, _MIDDLE, _LAST = 11, 9, 9
"""Tokens of the three documents of a sequence, the middle one longer than a window by that where there is one."""
_READ = 100_000  # tokens of the training text, whose ids the probe takes
_OF_JOINED, _OF_JOINED_HALF, _OF_JOINED_ALONE = 1e-3, 0.02, 0.25
"""Shares of what joining documents does to hidden states: by a changed document, in fp32 and half precision, and
compared with each alone, where every kernel may be another (deep random models in bf16 come to 0.16)."""


class IsolationError(ValueError):
    """A model that cannot keep packed documents apart."""


class _Probe(NamedTuple):
    """Two sequences of three documents, with one document of each changed, and the first sequence's one by one."""

    ids: Tensor
    """int64 [2, S]."""
    changed: Tensor
    """int64 [2, S]: with another first document in the first sequence, and another second one in the second."""
    positions: Tensor
    """int64 [2, S]."""
    untouched: tuple[tuple[int, slice], ...]
    """Sequence and place of each document that is in both."""
    alone: Tensor
    """int64 [3, L], the documents of the first sequence one by one, filled up on the right."""
    places: tuple[slice, ...]
    """Place of each of those in the first sequence."""


def isolate_documents(session: Session) -> None:
    """Settle for student and teacher what keeps packed documents apart. All ranks call this.

    Raises:
        IsolationError: a model for which nothing does.
    """
    sides = session.plugin.sides
    probe = _probe(session)
    joined = _moved(session, probe, positions=False)
    open_sides = dict(sides)
    tries = {name: ways_of(side.model) for name, side in sides.items()}
    found: dict[str, tuple[float, float]] = {}
    for index in range(max(map(len, tries.values()))):
        for name, side in open_sides.items():
            side.isolation = tries[name][min(index, len(tries[name]) - 1)]
        found |= {name: moved for name, moved in _moved(session, probe).items() if name in open_sides}
        for name in list(open_sides):
            if _is_apart(session, name, found[name], joined[name]):
                _tell(session, name)
                del open_sides[name]
        if not open_sides:
            return
    raise _refusal(session, {name: found[name][0] for name in open_sides})


def _is_apart(session: Session, name: str, found: tuple[float, float], joined: tuple[float, float]) -> bool:
    eps = torch.finfo(_dtype(session, name)).eps
    share = _OF_JOINED if eps < 1e-4 else _OF_JOINED_HALF
    by_change = max(min(16 * eps, 2e-3), share * joined[0])
    alone = max(8 * eps, _OF_JOINED_ALONE * joined[1])
    return found[0] <= by_change and found[1] <= alone  # neither with NaN


def _dtype(session: Session, name: str) -> torch.dtype:
    """The coarsest precision in which the model computes."""
    config = session.config
    if session.mode == "deepspeed" and uses_autocast(config.deepspeed):
        return torch.bfloat16
    return DTYPES[config.student.dtype if name == "student" else config.teacher.dtype]


def _moved(session: Session, probe: _Probe, *, positions: bool = True) -> dict[str, tuple[float, float]]:
    """By side: how far documents move when another one changes, and from where they are alone; relative, at most."""
    given = probe.positions if positions else None
    packed, changed = (_hidden_states(session, ids, given) for ids in (probe.ids, probe.changed))
    alone = _hidden_states(session, probe.alone, None)
    numbers: dict[str, float] = {}
    for name, hidden in packed.items():
        others = [_distance(changed[name][row, at], hidden[row, at]) for row, at in probe.untouched]
        lengths = [place.stop - place.start for place in probe.places]
        each = [
            _distance(hidden[0, place], alone[name][row, :length])
            for row, (place, length) in enumerate(zip(probe.places, lengths, strict=True))
        ]
        numbers |= {f"{name}: changed": _largest(others), f"{name}: alone": _largest(each)}
    numbers = reduce_numbers(numbers, op="max")
    return {name: (numbers[f"{name}: changed"], numbers[f"{name}: alone"]) for name in packed}


def _distance(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _largest(values: list[float]) -> float:
    """The maximum, infinite if one is not a number: `max` may pass over it."""
    return max(value if value == value else float("inf") for value in values)


def _hidden_states(session: Session, ids: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
    """Hidden states `[B, S, D]` of each side, of one forward without targets."""
    device, ignored = session.place.device, session.config.distill.ignore_index
    inputs = {"input_ids": ids, "shift_labels": torch.full_like(ids, ignored), "loss_rows": ids.new_empty(0)}
    soft_items = soft_items_of(session.config.distill, 1)
    if positions is not None:
        inputs["position_ids"] = positions
    seen: dict[str, Tensor] = {}
    with session.plugin.unmeasured(), session.evaluating(), _recording(session, seen):
        session.engine.evaluate({name: value.to(device) for name, value in inputs.items()} | soft_items, num_items=1)
    return seen


@contextmanager
def _recording(session: Session, seen: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda hidden: seen.__setitem__(name, hidden.detach())

    sides = session.plugin.sides
    for name, side in sides.items():
        side.on_hidden = keep(name)
    try:
        yield
    finally:
        for side in sides.values():
            side.on_hidden = None


def _probe(session: Session) -> _Probe:
    """Documents of ids from the training text, as long as it takes to leave the models' windows."""
    dataset = session.batches.dataset
    lengths = _lengths(dataset.seq_len, max((_window(side.model) for side in session.plugin.sides.values()), default=0))
    order = (lengths, lengths[::-1])
    ends = [np.cumsum([0, *row]).tolist() for row in order]
    places = [tuple(slice(a, b) for a, b in pairwise(row)) for row in ends]
    text, _ = dataset.read(0, min(_READ, dataset.num_tokens))
    ids = _ids(text, sum(lengths))
    changed = ids.clone()
    for row in (0, 1):  # the document of that number
        changed[row, places[row][row]] = ids[1 - row, places[row][row]]
    alone = ids[0, 0].expand(len(lengths), max(lengths)).clone()
    for row, place in enumerate(places[0]):
        alone[row, : lengths[row]] = ids[0, place]
    return _Probe(
        ids=ids,
        changed=changed,
        positions=torch.stack([torch.cat([torch.arange(length) for length in row]) for row in order]),
        untouched=tuple((row, at) for row in (0, 1) for number, at in enumerate(places[row]) if number != row),
        alone=alone,
        places=places[0],
    )


def _lengths(seq_len: int, window: int) -> tuple[int, ...]:
    """Tokens of each document of a sequence: three, or two where there is no room for three."""
    wanted = _FIRST + (window if window < seq_len else 0) + _MIDDLE + _LAST
    total = min(wanted, seq_len)
    if total >= _FIRST + _MIDDLE + _LAST:
        return _FIRST, total - _FIRST - _LAST, _LAST
    third = max(1, total // 3)
    return (total - 2 * third, third, third) if total > 2 else (1, 1)


def _window(model: torch.nn.Module) -> int:
    """The longest window of attention among a model's settings; 0 without one."""
    return max((value for value in windows_of(model).values() if isinstance(value, int)), default=0)


def _ids(text: np.ndarray, length: int) -> Tensor:
    """Two sequences of ids of `text` that differ everywhere, int64 [2, length]."""
    known = np.unique(text)
    if len(known) == 1:
        known = np.append(known, known[0] - 1 if known[0] else 1)
    first = np.random.default_rng(0).integers(len(known), size=length)
    second = (first + 1 + np.random.default_rng(1).integers(len(known) - 1, size=length)) % len(known)
    return torch.from_numpy(known[np.stack([first, second])].astype(np.int64))


def _tell(session: Session, name: str) -> None:
    how: dict[Way | None, str] = {
        "position_ids": "by positions, from which it makes its masks",
        "mask": "by its attention masks",
        "varlen": "by their bounds, given to flash attention",
    }
    side = session.plugin.sides[name]
    logger.info("data.packing isolated: the %s keeps documents apart %s", name, how[side.isolation])


def _class_of(model: torch.nn.Module) -> str:
    """The name of its class, and not of the one that FSDP2 makes of it."""
    return next(kind.__name__ for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))


def _refusal(session: Session, leaks: dict[str, float]) -> IsolationError:
    lines = []
    for name, leak in leaks.items():
        model = session.plugin.sides[name].model
        recurrent = recurrent_layers(model)
        state = f"; {', '.join(recurrent)} carry a state from token to token" if recurrent else ""
        lines.append(
            f"the {name} ({_class_of(model)}, attention {attention_of(model) or 'of its own'}) does not keep "
            f"packed documents apart: another document changes the hidden states of one by {leak:.1%}, or they are not "
            f"those of the document alone{state}"
        )
    return IsolationError("; ".join(lines) + ": set data.packing to joined, where each reads what stands before it")
