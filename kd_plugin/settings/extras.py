"""Packages that only some settings need."""

from __future__ import annotations

import importlib.util


def require(package: str, why: str) -> None:
    """Look for an optional package before the work that needs it.

    Args:
        package: its name, as it is imported.
        why: what needs it, as the end of "... is not installed and".

    Raises:
        ImportError: it is not installed; the message has the pip command that brings it.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed and {why}: pip install 'kd-plugin[train]'")
