"""Part of `gpu.py`: two ranks on one device, by gloo; FSDP2's gradients equal those of one process.

NCCL refuses two ranks on one GPU. gloo carries the tensors through the host, which says nothing of speed, and shows
whether kd_plugin's collectives and hooks work on tensors of this device. Small Qwen3 models in fp32, ragged labels.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from contestants import relative
from gpu_part import Part, part
from gpu_step import QUICK_COMMON, QUICK_STUDENT, QUICK_TEACHER
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import kd_plugin as kd
from kd_plugin.distributed.collectives import end_process_groups
from kd_plugin.engines.fsdp_units import make_mesh, shard_student, shard_teacher

RANKS = 2
MODES = ("weight", "logits", "stats")
_PATIENCE = timedelta(seconds=60)


def make_models(options: Part) -> tuple[Any, Any]:
    """Student and teacher, in fp32, the same on every rank."""
    models = []
    for sizes in (QUICK_STUDENT, QUICK_TEACHER):
        torch.manual_seed(len(models))
        config = Qwen3Config(**QUICK_COMMON, **sizes, tie_word_embeddings=False)
        models.append(Qwen3ForCausalLM(config).to(options.device))
    return models[0], models[1].eval().requires_grad_(False)


def make_batch(options: Part) -> tuple[Tensor, Tensor]:
    """Ids and labels `[4, 24]`; the ranks' halves have different numbers of labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, QUICK_COMMON["vocab_size"], (2 * RANKS, 24), generator=generator)
    labels = ids.clone()
    labels[0, :9] = labels[3, 15:] = -100
    labels[1, 5] = -100
    return ids.to(options.device), labels.to(options.device)


def gradients(options: Part, mode: str, rank: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and whole gradients by name: of the whole batch, or of two ranks with one half each."""
    student, teacher = make_models(options)
    config = kd.DistillConfig(exchange=mode if rank is not None else "auto", row_kernel="eager", temperature=2.0)
    kd.attach(student, teacher, config)
    ids, labels = make_batch(options)
    if rank is not None:
        shard_student(student, make_mesh(options.device, RANKS), dtype=torch.float32)
        shard_teacher(teacher, make_mesh(options.device, RANKS))
        ids, labels = (t.chunk(RANKS)[rank] for t in (ids, labels))
    loss = student(input_ids=ids, labels=labels).loss
    loss.backward()
    found = {}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    loss = loss.detach()
    if rank is not None:  # each rank's loss is its share of what the wrapper averages
        dist.all_reduce(loss)
        loss /= RANKS
    return loss, found


def run_rank(rank: int, options: Part, file: str) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    if options.device != "cpu":
        torch.cuda.set_device(0)
    wanted_loss, wanted = gradients(options, "auto", None)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS, timeout=_PATIENCE)
    for index, mode in enumerate(MODES):
        try:
            loss, found = gradients(options, mode, rank)
        except Exception as error:  # the other rank may now wait for this one: nothing more can be tried
            traceback.print_exc()
            if rank == 0:
                options.skip(f"two ranks, exchange {mode}", error)
                for other in MODES[index + 1 :]:
                    options.skip(f"two ranks, exchange {other}", "not tried after that")
            os._exit(0)
        if rank == 0:
            worst = max(relative(gradient, wanted[name]) for name, gradient in found.items())
            values = {"gradient_error": worst, "loss_error": relative(loss, wanted_loss), "parameters": len(found)}
            options.emit("ranks", key=mode, exchange=mode, **values)
    end_process_groups()


def main() -> int:
    """Run everything; returns the exit code."""
    options = part(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "ranks")
        torch.multiprocessing.spawn(run_rank, args=(options, file), nprocs=RANKS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
