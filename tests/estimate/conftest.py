"""What estimates share."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from kd_plugin.estimate import account
from kd_plugin.estimate.sizes import ModelSizes, load_sizes
from kd_plugin.settings.run import RunConfig


@pytest.fixture(autouse=True, scope="module")
def read_sizes_once() -> Iterator[None]:
    """The layouts of one pair of models share what was read of them."""
    known: dict[tuple[object, ...], tuple[ModelSizes, ModelSizes]] = {}

    def load_once(config: RunConfig) -> tuple[ModelSizes, ModelSizes]:
        teacher = config.teacher.model_dump_json(exclude={"offload", "sharding"})
        read = config.train.micro_batch_size, config.data.seq_len, config.data.packing
        key = config.student.model_dump_json(), teacher, *read
        if key not in known:
            known[key] = load_sizes(config)
        return known[key]

    with mock.patch.object(account, "load_sizes", load_once):
        yield
