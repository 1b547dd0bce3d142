"""What a step sends, to whom and in how many rounds, and what it holds. Every probe takes this process's rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import kd_plugin as kd
from benchmarks.received import Received
from kd_plugin.engines import fsdp_units
from tests.allocations import NewTensors
from tests.ranks.attach_cases import make_model
from tests.ranks.collectives import CollectiveLog, local_shard
from tests.ranks.sharded_heads import (
    CHUNK,
    MODES,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    VOCAB_SIZE,
    make_config,
    make_student,
    step,
)
from tests.ranks.worker import save_probes

TRAFFIC_ROWS, TRAFFIC_VOCAB, TRAFFIC_WIDTH = 512, 12288, 576
LOGITS_ROWS, LOGITS_VOCAB, LOGITS_WIDTH = 256, 4096, 64
# Divergence -> rounds of statistics per chunk
ROUNDS = dict.fromkeys(("forward_kl", "soft_ce", "reverse_kl", "logit_mse"), 1)
ROUNDS |= dict.fromkeys(("jsd", "tvd", "acceptance", "cosine"), 2)


def memory(rank: int) -> list[tuple[int, ...]]:
    """Shapes of all tensors made in the first two steps, in `stats` mode."""
    student, _ = make_student(make_config("stats"), VOCAB_SIZE, (STUDENT_WIDTH, TEACHER_WIDTH))
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
    with NewTensors() as seen:
        step(student, input_ids)
    return sorted(seen.shapes)


def head_collectives(rank: int) -> dict[str, list[Any]]:
    """The collectives of a step after the first, by exchange."""
    found = {}
    for exchange in ("weight", "stats"):
        student, plugin = make_student(make_config(exchange), VOCAB_SIZE, (STUDENT_WIDTH, TEACHER_WIDTH))
        input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
        step(student, input_ids)
        models = {"student head": student, "teacher head": plugin.teacher}
        with CollectiveLog({name: local_shard(m.get_output_embeddings()) for name, m in models.items()}) as log:
            step(student, input_ids)
        found[exchange] = log.calls
    return found


def counting(rank: int) -> dict[str, dict[str, Any]]:
    """By exchange: this rank's loss and collectives in a step whose tokens are counted, and given."""
    found: dict[str, dict[str, Any]] = {}
    for exchange in MODES:
        student, _ = make_student(make_config(exchange), VOCAB_SIZE, (STUDENT_WIDTH, TEACHER_WIDTH))
        input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
        targets = input_ids.masked_fill(input_ids % 3 == 0, -100)
        items = torch.tensor(int((targets != -100).sum()))
        dist.all_reduce(items)
        step(student, input_ids)
        found[exchange] = {}
        for name, given in (("counted", {}), ("given", {"num_items_in_batch": int(items)})):
            with CollectiveLog() as log:
                loss = student(input_ids, shift_labels=targets, **given).loss
            found[exchange][name] = float(loss), [call.operation for call in log.calls]
    return found


def rounds(rank: int) -> dict[str, list[str]]:
    """By divergence: the collectives of one more chunk in `stats` mode, sorted."""
    found = {}
    for divergence in ROUNDS:
        student, _ = make_student(make_config("stats", divergence=divergence), 37, (STUDENT_WIDTH, TEACHER_WIDTH))
        calls = []
        for length in (CHUNK, CHUNK, 2 * CHUNK):  # the first compares the ranks' settings
            input_ids = torch.full((1, length), 3)
            with CollectiveLog() as log:
                student(input_ids, shift_labels=input_ids, num_items_in_batch=length)
            calls.append(Counter(call.operation for call in log.calls))
        found[divergence] = sorted((calls[2] - calls[1]).elements())
    return found


def traffic(rank: int) -> dict[str, float]:
    """Bytes received in one step. `stats` has the real rows and `weight` the real heads: each ignores the other."""
    sizes = {
        "weight": (TRAFFIC_VOCAB, TRAFFIC_WIDTH, (1, 8)),
        "stats": (61, TRAFFIC_WIDTH, (TRAFFIC_ROWS // 64, 64)),
        "logits": (LOGITS_VOCAB, LOGITS_WIDTH, (LOGITS_ROWS // 64, 64)),
    }
    found = {}
    for exchange, (head_size, width, shape) in sizes.items():
        student, _ = make_student(make_config(exchange, chunk_size=64), 61, (width, width), head_size)
        input_ids = torch.full(shape, 3 + rank)
        with torch.no_grad():  # once, the ranks compare their settings and cut the teacher's head
            student(input_ids[:1, :2], shift_labels=input_ids[:1, :2], num_items_in_batch=1)
        with Received() as log:
            step(student, input_ids)
        found[exchange] = log.total
    return found


class Groups(TorchDispatchMode):
    """The ranks of every collective, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.found: dict[str, set[tuple[int, ...]]] = {"forward": set(), "backward": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            (group,) = map(dist.ProcessGroup.unbox, groups)
            self.found[self.phase].add(tuple(dist.get_process_group_ranks(group)))
        return func(*args, **(kwargs or {}))


def groups(rank: int) -> dict[str, set[tuple[int, ...]]]:
    """Who takes part in the collectives of a step after the first, in `stats` mode: two copies of two shards."""
    models = [make_model("llama", width, 37, seed=i) for i, width in enumerate((STUDENT_WIDTH, TEACHER_WIDTH))]
    kd.attach(*models, make_config("stats"))
    mesh = fsdp_units.make_mesh("cpu", 4, shard_size=2)
    fsdp_units.shard_student(models[0], mesh, dtype=torch.float32)
    fsdp_units.shard_teacher(models[1], mesh)
    input_ids = torch.full((1, 9), 3)
    step(models[0], input_ids)
    with Groups() as log:
        loss = models[0](input_ids, shift_labels=input_ids, num_items_in_batch=36).loss
        log.phase = "backward"
        loss.backward()
    return log.found


def run(folder: Path, spec: list[str], rank: int) -> None:
    """Write FOLDER/<name>.pt for the functions that `spec` names."""
    save_probes(folder, [globals()[name] for name in spec], rank)
