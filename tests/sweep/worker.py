"""Prints one line of JSON for each row named on the command line: its verdict, reason and facts."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from tests.sweep.verdict import Verdict, facts_of, judge, make_case, one_line


def measure(row: str) -> dict[str, Any]:
    """Verdict and reason of a row, and the facts where it can be built."""
    try:
        case = make_case(row)
    except Exception as error:
        return Verdict("cannot be built", one_line(error))._asdict()
    try:
        facts = facts_of(case)
        at_once, late = judge(case), judge(case, late=True)
        return {**at_once._asdict(), "late": late.verdict, "late_reason": late.reason, **facts}
    except Exception as error:
        return Verdict("mismatch", f"the sweep itself failed: {one_line(error)}")._asdict()


def main() -> None:
    """Measure the rows in order."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    for row in sys.argv[1:]:
        print(json.dumps(measure(row)), flush=True)


if __name__ == "__main__":
    main()
