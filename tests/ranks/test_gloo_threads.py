"""The end of a process's ranks waits for gloo's threads, which need the interpreter to drop their tensors."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from kd_plugin.distributed.collectives import end_process_groups, wait_for_gloo
from kd_plugin.engines.process_group import start_process_group

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are looked up in /proc")

SET_NAME = 15  # PR_SET_NAME of prctl(2)


@contextmanager
def gloo_thread(work: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread with the name of gloo's that does `work` and ends."""
    named = threading.Event()

    def run() -> None:
        ctypes.CDLL(None).prctl(SET_NAME, b"pt_gloo_runloop")
        named.set()
        work()

    thread = threading.Thread(target=run)
    thread.start()
    named.wait()
    try:
        yield thread
    finally:
        thread.join()


def busy(seconds: float) -> None:
    """Compute for so long, mostly without the interpreter's lock."""
    block, end = bytes(1 << 20), time.monotonic() + seconds
    while time.monotonic() < end:
        hashlib.sha256(block)


def test_a_thread_of_gloo_that_still_works_is_waited_for() -> None:
    with gloo_thread(lambda: busy(1.0)) as thread:
        assert thread.is_alive()
        wait_for_gloo()
        assert not thread.is_alive()


def test_a_thread_of_gloo_that_waits_for_work_is_not() -> None:
    over = threading.Event()
    with gloo_thread(over.wait) as thread:
        wait_for_gloo()
        assert thread.is_alive()
        over.set()


@pytest.mark.parametrize("owned", [True, False])
def test_whoever_ends_a_run_waits(owned: bool) -> None:
    outer = None if owned else start_process_group(60)
    place = start_process_group(60)
    with gloo_thread(lambda: busy(1.0)) as thread:
        place.close()
        assert not thread.is_alive()
        assert dist.is_initialized() != owned
    if outer:
        end_process_groups()
