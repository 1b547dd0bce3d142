"""The one fixture that launches ranks: test modules list what they may ask for in LAUNCHES."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ranks.launch import Launch, Launched, Launches

# Those of a whole session may share their processes, and the first test of all waits for them.
TIMEOUT_S = 1500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(getattr(item, "module", None), "LAUNCHES"):
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def all_launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    """Of all test modules of this session; at its end no rank may have failed."""
    modules = dict.fromkeys(item.module for item in request.session.items if isinstance(item, pytest.Function))
    listed = [launch for module in modules for launch in getattr(module, "LAUNCHES", {}).values()]
    launches = Launches(listed, tmp_path_factory.mktemp)
    yield launches
    assert not launches.failures


@pytest.fixture(scope="module")
def launched(request: pytest.FixtureRequest, all_launches: Launches) -> Callable[[str], Launched]:
    """What the ranks of a launch wrote, by its name in the module's LAUNCHES."""
    listed: dict[str, Launch] = request.module.LAUNCHES

    def by_name(name: str) -> Launched:
        if listed[name].needs_deepspeed:
            pytest.importorskip("deepspeed")
        return all_launches[listed[name]]

    return by_name


@pytest.fixture(scope="module")
def result_of(request: pytest.FixtureRequest, launched: Callable[[str], Launched]) -> Callable[..., Any]:
    """What was written about one of the cases to train, or to watch, of whichever launch has it."""
    listed: dict[str, Launch] = request.module.LAUNCHES

    def by_case(case: Any, work: str = "train") -> Any:
        name = next(name for name, launch in listed.items() if case in launch.spec.get(work, ()))
        return launched(name).file(f"{case.name}.{work}.pt")

    return by_case
