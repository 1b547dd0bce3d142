"""What a refusal says."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refused(call: Callable[[], object], *words: str) -> None:
    """`call` raises a ValueError whose message has one line and all `words`."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"
