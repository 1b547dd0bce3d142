"""Shared by all tests: the environment that they run in, and a small valid configuration."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_plugin.settings import distill
from tests.minimal_config import MINIMAL

# Before anything imports torch: the processes of the distributed tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tokenised text of earlier tests, and of the user, is none of theirs.
_cache = tempfile.TemporaryDirectory(prefix="kd_plugin-cache-")
os.environ["KD_PLUGIN_CACHE"] = _cache.name
# Nothing here may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_registered_divergence_stays() -> Iterator[None]:
    """Else an error that lists the known ones would depend on the order of the tests."""
    before = set(distill.registered_names)
    yield
    if added := distill.registered_names - before:
        from kd_plugin.divergences import registered, registry

        for name in added:
            distill.registered_names.remove(name)
            del registry.DIVERGENCES[name], registered._functions[name]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A valid configuration of four lines."""
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path
