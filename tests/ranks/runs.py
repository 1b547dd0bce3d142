"""What is read off a run of `kd.train`."""

from __future__ import annotations

from typing import Any

from kd_plugin.training.run import TrainResult


def curve(result: dict[str, Any] | TrainResult, name: str = "loss") -> list[float]:
    """One number of every logged step."""
    history = result.history if isinstance(result, TrainResult) else result["history"]
    return [values[name] for values in history]
