"""What was read from one source: how many rows of which form, what was left out and why, what looks like a mistake."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kd_plugin.data.corpus import Corpus, Document
from kd_plugin.data.record import DataError, Record
from kd_plugin.data.turns import says_nothing

__all__ = ["Counted", "Tally"]

logger = logging.getLogger(__name__)


class Counted(NamedTuple):
    """How often something was found, and where first."""

    number: int
    first: str


class Tally:
    """Counts the records of one source on their way to documents.

    Attributes:
        forms: form of a row -> number of records.
        left_out: reason -> the records without a token to train on, or without one that the teacher reads, too.
        empty: turns of the assistant that are trained on and say nothing.
        warnings: what was warned of on the way, for whoever reads the documents later.
    """

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self.left_out: dict[str, Counted] = {}
        self.empty = Counted(0, "")
        self.warnings: list[str] = []
        self._on_the_way: deque[Record] = deque()

    def counted(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield `records`, and count them."""
        for record in records:
            self.forms[record.row_form or record.form] += 1
            for place in _empty_answers(record):
                self.empty = Counted(self.empty.number + 1, self.empty.first or place)
            self._on_the_way.append(record)
            yield record

    def kept(self, documents: Iterable[Document | str | None]) -> Iterator[Document]:
        """Yield the documents of the records that were counted, in their order, and count what comes instead of one.

        That is the reason why the record is left out, or None.
        """
        for document in documents:
            record = self._on_the_way.popleft()
            if isinstance(document, Document):
                yield document
                continue
            reason = _why_left_out(record) if document is None else document
            count, first = self.left_out.get(reason, Counted(0, record.where))
            self.left_out[reason] = Counted(count + 1, first)

    @property
    def num_records(self) -> int:
        """Number of records that were read."""
        return self.forms.total()

    @property
    def num_left_out(self) -> int:
        """Number of records without a token to train on."""
        return sum(counted.number for counted in self.left_out.values())

    def reasons(self) -> str:
        """Why records were left out, each reason with its number and first place."""
        reasons = self.left_out.items()
        return "; ".join(f"{counted.number} x {reason} (first: {counted.first})" for reason, counted in reasons)

    def report(self, name: str, source: str, documents: Corpus) -> None:
        """Log what was read from `source`, which the setting `name` named.

        Raises:
            DataError: there are no documents.
        """
        if not documents:
            reasons = f": {self.reasons()}" if self.left_out else ""
            raise DataError(f"{name}: {source} has no text to train on ({self.num_records} records read{reasons})")
        by_form = ", ".join(f"{count} x {form}" for form, count in self.forms.items())
        counts = len(documents), documents.num_tokens
        logger.info("%s: %s in %s; %d documents, %d tokens", name, by_form, source, *counts)
        for line in self.faults():
            logger.warning("%s: %s", name, line)

    def faults(self) -> list[str]:
        """One line for each thing that looks like a mistake in the data."""
        lines = list(self.warnings)
        if self.left_out:
            lines.append(f"{self.num_left_out} record(s) without a token to train on were left out: {self.reasons()}")
        if self.empty.number:
            lines.append(
                f"{self.empty.number} turn(s) of the assistant are empty (first: {self.empty.first}): the student "
                "learns to end there at once; mark them with weight: 0, or leave them out"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """The tally as JSON can hold it."""
        return {"forms": self.forms, "left_out": self.left_out, "empty": self.empty, "warnings": self.warnings}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """The tally that `to_json` gave."""
        tally = cls()
        tally.forms, tally.warnings = Counter(values["forms"]), list(values["warnings"])
        tally.left_out = {reason: Counted(*counted) for reason, counted in values["left_out"].items()}
        tally.empty = Counted(*values["empty"])
        return tally


def _empty_answers(record: Record) -> Iterator[str]:
    """Places of the turns that are trained on and say nothing."""
    if record.form == "messages":
        for index, turn in enumerate(record.values["messages"]):
            trained = index and turn["role"] == "assistant" and index not in record.values["untrained"]
            if trained and says_nothing(turn):
                yield f"{record.where}, turn {index + 1}"


def _why_left_out(record: Record) -> str:
    if record.form == "text":
        return "no text"
    if record.form == "prompt + completion":
        return "no completion"
    roles = [turn["role"] for turn in record.values["messages"]]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    if not answers:
        return f"no turn of the assistant, roles found: {', '.join(sorted(set(roles))) or 'none'}"
    if record.values["untrained"].issuperset(answers):
        return "no turn of the assistant that is to be trained on"
    return "nothing but an opening line of the assistant" if answers == [0] else "no token that is trained on"
