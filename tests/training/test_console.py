"""Lines of the terminal fit on it, and bars are shown where somebody sees them."""

from __future__ import annotations

import io
import logging
import math
import sys
import time

import pytest

from kd_plugin.distributed import bars
from kd_plugin.training.console import eval_line, step_line

USUAL = {
    "loss": 2.41131,
    "soft_loss": 1.90124,
    "hard_loss": 2.92138,
    "top1_agreement": 0.3341,
    "lr": 1e-4,
    "grad_norm": 0.8712,
    "tokens_per_second": 12345.6,
    "memory_gib": 3.14,
}
EXTREME = {
    "loss": 12.3456,
    "soft_loss": 12.3456,
    "hard_loss": 12.3456,
    "router_loss": 0.0123456,
    "top1_agreement": 1.0,
    "lr": 1e-4,
    "grad_norm": 123456.7,
    "tokens_per_second": 1_234_567.0,
    "memory_gib": 139.9,
}


def test_a_usual_line_has_all_that_is_watched() -> None:
    line = step_line(12, 40, USUAL, eta_s=80)
    assert line == "step 12/40 loss 2.411 soft 1.901 hard 2.921 agree 33% tok/s 12.3k eta 1m20s"
    wide = step_line(12, 40, USUAL, eta_s=80, width=120)
    assert wide == (
        "step 12/40 loss 2.411 soft 1.901 hard 2.921 agree 33% lr 1.0e-04 gnorm 0.871 tok/s 12.3k mem 3.1GiB eta 1m20s"
    )


@pytest.mark.parametrize("last", [1, 40, 99_999, 100_000, 10_000_000])
@pytest.mark.parametrize("eta", [0.0, 59.6, 86_399.0, 359_999.0])
@pytest.mark.parametrize("values", [USUAL, EXTREME, dict.fromkeys(EXTREME, math.nan), dict.fromkeys(EXTREME, -1.23e30)])
def test_no_step_line_is_wider_than_80_columns(last: int, eta: float, values: dict[str, float]) -> None:
    line = step_line(last, last, values, eta_s=eta)
    assert len(line) <= 80 and line.startswith(f"step {last}") and " loss " in line


def test_the_longest_run_still_shows_losses_agreement_speed_and_time_left() -> None:
    line = step_line(100_000, 100_000, EXTREME, eta_s=359_999)
    assert line == "step 100000 loss 12.35 soft 12.35 hard 12.35 agree 100% tok/s 1.23M eta 99h59m"


def test_an_evaluation_is_one_line_of_80_columns() -> None:
    names = ("hard_loss", "soft_loss", "teacher_entropy", "top1_agreement", "acceptance_rate", "kl_t1", "perplexity")
    assert eval_line(3, dict.fromkeys(names, 0.5)) == (
        "eval step 3 perplexity 0.5 KL 0.5 agree 50% accept 50% hard 0.5 soft 0.5"
    )
    assert len(eval_line(100_000, dict.fromkeys(names, 123456.7))) <= 80


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(bars.bar(range(3), what="evaluation", unit="batch", total=3)) == [0, 1, 2]
        assert ("evaluation" in stream.getvalue() and "/3" in stream.getvalue()) == drawn
        assert drawn or not stream.getvalue()


def test_no_bar_is_drawn_by_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(bars.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(sys, "stderr", Terminal())
    items = range(3)
    assert bars.bar(items, what="x", unit="y") is items


def test_what_takes_long_is_said_once_and_what_does_not_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        with bars.said_if_slow("compiling", after_s=30):
            pass
        assert caplog.messages == []
        with bars.said_if_slow("compiling", after_s=0.01):
            until = time.monotonic() + 20
            while not caplog.messages and time.monotonic() < until:
                time.sleep(0.01)
    assert caplog.messages == ["compiling"]
