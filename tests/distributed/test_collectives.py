"""Collectives that fail say which they were; alone, they do what their names say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from kd_plugin.distributed import collectives
from kd_plugin.distributed.collectives import CollectiveError, located, named, named_in_wrapper

TIMED_OUT = "Timed out waiting 1800000ms for recv operation to complete"


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    collectives.end_process_groups()


def test_a_failure_has_the_name_of_its_collective_the_rank_and_the_usual_cause(group: None) -> None:
    with pytest.raises(CollectiveError) as caught, named("all-reduce of the loss"):
        raise RuntimeError(f"{TIMED_OUT}.\nException raised from waitRecv")
    message = str(caught.value)
    assert message.startswith(f"rank 0 of 1, all-reduce of the loss: {TIMED_OUT}. Most likely another rank failed")
    assert "waitRecv" not in message
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_device_without_memory_is_no_failure_of_the_other_ranks(group: None) -> None:
    with pytest.raises(torch.OutOfMemoryError), named("all-reduce of the loss"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_where_the_rank_was_in_its_work_is_added_on_failure_only(group: None) -> None:
    asked = []

    def where() -> str:
        asked.append(1)
        return "chunk 2 of 3"

    with located(where):
        pass
    assert not asked
    with pytest.raises(CollectiveError) as caught, located(where), named("all-gather of logits"):
        raise RuntimeError(TIMED_OUT)
    assert caught.value.where == ("rank 0 of 1, all-gather of logits", "chunk 2 of 3")
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("words", [TIMED_OUT, "Connection closed by peer [127.0.0.1]:1234", "NCCL error"])
def test_a_failed_gather_of_a_wrapper_is_known_by_the_words_of_its_backend(group: None, words: str) -> None:
    with pytest.raises(CollectiveError, match="wrapper in its forward"), named_in_wrapper("in its forward"):
        raise RuntimeError(words)


def test_other_errors_inside_a_wrapper_stay_as_they_are(group: None) -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), named_in_wrapper("in its forward"):
        raise RuntimeError("shapes differ")


def test_a_rank_alone_gathers_scatters_and_sums_its_own(group: None) -> None:
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(collectives.all_gather(x, None, "x"), x)
    gathered, pending = collectives.all_gather(x, None, "x", wait=False)
    pending.wait()
    assert torch.equal(gathered, x)
    assert torch.equal(collectives.reduce_scatter(x, None, "x"), x)
    total = x.clone()
    collectives.all_reduce(total, None, "x")
    assert torch.equal(total, x)
    received = torch.empty(6)
    collectives.all_to_all(received, x.flatten(), [6], [6], None, "x").wait()
    assert torch.equal(received, x.flatten())
    assert collectives.all_gather_object({"rows": 3}, None, "rows") == [{"rows": 3}]


def test_without_torch_distributed_there_is_one_rank() -> None:
    assert collectives.num_ranks() == 1
