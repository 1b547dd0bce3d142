"""What a weight's wrapper has left here, and how the vocabulary is cut, in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from kd_plugin.distributed import layout
from kd_plugin.distributed.collectives import end_process_groups
from kd_plugin.distributed.vocab_slice import Sizes, cut


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    end_process_groups()


@pytest.fixture
def weight(group: None) -> DTensor:
    """`[6, 4]`, cut over the only rank there is."""
    return distribute_tensor(torch.arange(24.0).view(6, 4), init_device_mesh("cpu", (1,)), [Shard(0)])


class OfRanks:
    """Rank `rank` of `ranks`, as far as a cut asks torch.distributed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
        self.rank = 0
        monkeypatch.setattr(dist, "get_world_size", lambda _group: ranks)
        monkeypatch.setattr(dist, "get_rank", lambda _group: self.rank)


@pytest.mark.parametrize(("size", "ranks"), [(10, 1), (10, 2), (10, 3), (10, 4), (9, 8), (3, 5), (50257, 7)])
def test_the_vocabulary_is_cut_as_torch_chunk_cuts_it(size: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, ids = OfRanks(monkeypatch, ranks), torch.arange(size)
    pieces = [piece.tolist() for piece in ids.chunk(ranks)]
    pieces += [[]] * (ranks - len(pieces))
    assert layout.chunk_length(size, ranks) == len(pieces[0])
    for processes.rank, wanted in enumerate(pieces):
        piece = cut(size, None, dist.group.WORLD)
        assert ids[piece.start : piece.stop].tolist() == wanted
        assert piece.size == len(wanted)
        assert piece.of_teacher == slice(piece.start, piece.stop), "without a teacher all ids are shared"


@pytest.mark.parametrize(("teacher_size", "columns"), [(7, [4, 3, 0]), (10, [4, 4, 2]), (12, [4, 4, 2])])
def test_each_rank_has_the_shared_ids_of_its_slice(
    teacher_size: int, columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, found = OfRanks(monkeypatch, 3), []
    for processes.rank in range(3):
        piece = cut(10, teacher_size, dist.group.WORLD)
        found.append(piece.teacher_columns)
        assert piece.sizes == Sizes(10, min(teacher_size, 10))
        assert piece.sizes.unequal is (teacher_size < 10)
    assert found == columns


def test_a_plain_weight_is_whole() -> None:
    head = nn.Linear(4, 6)
    assert layout.sharded_over(head.weight, 24) == 1
    assert layout.whole_shape(head.weight, head) == (6, 4)
    assert layout.vocab_cut(head.weight) is None
    assert layout.local_part(head.weight) is head.weight
    assert not layout.is_gathered(head)


def test_a_dtensor_says_over_how_many_ranks_it_is_cut(weight: DTensor) -> None:
    assert layout.is_dtensor(weight)
    assert layout.sharded_over(weight, 0) == 1
    assert layout.vocab_cut(weight) is None, "one rank has it whole"
    assert layout.placements_of(weight) == str(Shard(0))
    assert layout.placements_of(weight.redistribute(placements=[Replicate()])) == str(Replicate())
    assert torch.equal(layout.local_part(weight), torch.arange(24.0).view(6, 4))


def test_what_is_gathered_passes_its_gradient_on(weight: DTensor) -> None:
    weight.requires_grad_()
    whole = layout.gathered(weight)
    assert not layout.is_dtensor(whole)
    assert torch.equal(whole, torch.arange(24.0).view(6, 4))
    whole.sum().backward()
    assert isinstance(weight.grad, DTensor)
    assert torch.equal(weight.grad.to_local(), torch.ones(6, 4))


def test_only_a_dtensor_is_taken_apart() -> None:
    plain = torch.ones(6, 4, requires_grad=True)
    assert layout.gathered(plain) is plain
    assert layout.slice_here(plain, None) is plain
    assert not layout.loses_reduction(plain)


def freed() -> Tensor:
    """What FSDP1 leaves where it has freed a flat weight of 24 elements."""
    weight = torch.zeros(24)
    weight.untyped_storage().resize_(0)
    return weight


@pytest.mark.parametrize("weight", [torch.zeros(12), freed()], ids=["a shard", "freed"])
def test_a_flat_shard_does_not_say_how_it_is_cut(weight: Tensor) -> None:
    assert layout.sharded_over(weight, 24) is None
    assert layout.whole_shape(weight, nn.Linear(4, 6)) == (6, 4)


class Part:
    """The slice of a parameter that ZeRO-3 leaves on a rank, padded at the end."""

    ds_numel = 8

    def detach(self) -> Tensor:
        return torch.arange(8.0)


def of_zero3(rank: int) -> Tensor:
    """Rank `rank`'s of a `[5, 4]` parameter, of which three ranks hold 8, 8 and 4 elements."""
    parameter = torch.zeros(0)
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 0, torch.Size((5, 4)), 20
    parameter.ds_tensor, parameter.get_partition_rank = Part(), lambda: rank
    return parameter


@pytest.mark.parametrize(("rank", "elements"), [(0, 8), (1, 8), (2, 4)])
def test_a_partition_of_zero_3_is_read_without_its_padding(rank: int, elements: int) -> None:
    parameter = of_zero3(rank)
    assert layout.is_zero3(parameter)
    assert layout.sharded_over(parameter, 20) is None
    assert layout.whole_shape(parameter, nn.Linear(1, 1)) == (5, 4)
    assert layout.values_here(parameter).tolist() == list(range(elements))
