"""Entries of the list that tests.ranks.train_worker reads."""

from __future__ import annotations

from typing import Any


def layout(name: str) -> dict[str, Any]:
    if name.startswith("zero"):
        return {"train": {"parallel": "deepspeed"}, "deepspeed": {"zero_optimization": {"stage": int(name[-1])}}}
    return {"train": {"parallel": name}}


def run(name: str, of: str, *, train: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """One entry of the worker's list: `of` is a layout, `train` goes over its train section."""
    rest = {key: more.pop(key) for key in ("output", "keep") if key in more}
    sections = layout(of) | more
    sections["train"] = {**sections["train"], **(train or {})}
    return {"name": name, "sections": sections, **rest}
