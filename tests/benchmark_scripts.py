"""The benchmarks' modules, which are scripts that import each other by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@contextmanager
def loaded(names: tuple[str, ...]) -> Iterator[SimpleNamespace]:
    """The modules `names` as attributes, while the body runs."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in names:
            sys.modules.pop(name, None)
