"""Packages that only some settings need."""

from __future__ import annotations

import importlib.util

_BROUGHT_BY = {"torchao": "'kd-plugin[quantize]'", "bitsandbytes": "bitsandbytes"}
"""Package -> what pip installs for it; all others come with the extra `train`."""


def missing(package: str, why: str) -> str:
    """One line about an optional package that is not installed, as `require` says it; empty where it is."""
    if importlib.util.find_spec(package) is not None:
        return ""
    what = _BROUGHT_BY.get(package, "'kd-plugin[train]'")
    return f"{package} is not installed and {why}: pip install {what}"


def require(package: str, why: str) -> None:
    """Look for an optional package before the work that needs it.

    Args:
        package: its name, as it is imported.
        why: what needs it, as the end of "... is not installed and".

    Raises:
        ImportError: it is not installed; the message has the pip command that brings it.
    """
    if line := missing(package, why):
        raise ImportError(line)
