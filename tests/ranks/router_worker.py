"""Two ranks train a mixture of experts with its router loss: `router_worker.py FOLDER`; writes FOLDER/NAME.pt."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import kd_plugin as kd
from kd_plugin.distributed.collectives import end_process_groups
from tests.experts import make_mixture
from tests.ranks.attach_cases import STEPS, Case, items_of_step, make_batch
from tests.ranks.attach_worker import DeepSpeedRun, TorchRun

CASES = [
    Case(wrapper, "llama", teacher="replicate", num_items=counted, accumulation=2 if counted == "given" else 1)
    for wrapper in ("ddp", "fsdp", "zero2", "zero3")
    for counted in ("given", "counted")
]
MIXTURE = "Qwen3MoeForCausalLM"
CONFIG = kd.DistillConfig(soft_weight=0.0, hard_weight=1.0, row_kernel="eager", chunk_size=5)


def train(case: Case, rank: int) -> dict[str, object]:
    """Three steps of SGD; in the second, rank 1 has no valid token."""
    student = make_mixture(MIXTURE)
    plugin = kd.attach(student, None, CONFIG)
    run = (DeepSpeedRun if case.wrapper.startswith("zero") else TorchRun)(case, student, student, plugin)
    router, losses = [], []
    for step in range(STEPS):
        extra = {"num_items_in_batch": items_of_step(case, step)} if case.num_items == "given" else {}
        for micro in range(case.accumulation):
            input_ids, labels = make_batch(step, micro, rank)
            run.backward(run.model(input_ids, labels=labels, **extra).loss)
        run.step()
        measured = plugin.metrics()
        router.append(measured["router_loss"])
        losses.append(measured["loss"])
    found = {"parameters": run.parameters(), "router": router, "losses": losses}
    run.close()
    return found


def main(folder: Path) -> None:
    """All cases."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for case in CASES:
        found = train(case, rank)
        if rank == 0:
            torch.save(found, folder / f"{case.name}.pt")
    end_process_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
