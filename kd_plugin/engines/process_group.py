"""This process among all: device, rank, process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from kd_plugin.distributed import torch_internals
from kd_plugin.distributed.collectives import all_reduce, end_process_groups, wait_for_gloo


@dataclass(frozen=True)
class Placement:
    """This process among all: its device, its rank, and whether it started the process group itself."""

    device: torch.device
    rank: int
    world_size: int
    owns_group: bool

    def close(self) -> None:
        """End the process group if this run started it; in any case the process may end afterwards."""
        if self.owns_group:
            end_process_groups()
        else:
            wait_for_gloo()


def start_process_group(timeout_s: int) -> Placement:
    """Join the ranks that torchrun or deepspeed started; without a launcher this is a group of one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # DeepSpeed reads it once, at its first import, which Transformers does by itself where it is installed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    owns_group = not dist.is_initialized()
    if owns_group:
        backend, timeout = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (documented, but missing in __all__)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    return Placement(device, dist.get_rank(), dist.get_world_size(), owns_group)


def share_timeout(timeout_s: int) -> None:
    """Give every process group the run's timeout: those that meshes and DeepSpeed made for themselves have torch's."""
    for group in torch_internals.process_groups():
        torch_internals.set_timeout(timedelta(seconds=timeout_s), group)


def reduce_numbers(values: Mapping[str, float], *, op: str = "sum") -> dict[str, float]:
    """The sum or maximum (`op` "sum" or "max") of each number over all ranks, by one collective on the host."""
    if dist.get_world_size() == 1:
        return dict(values)
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device="cpu")
    operation = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
    all_reduce(packed, None, f"the numbers {', '.join(values)}", op=operation)
    return dict(zip(values, packed.tolist(), strict=True))
