"""A metric is defined once: its name, its value by every row pass and its tag follow from its entry in the list."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ADDED = """
import json, torch, torch.distributed as dist
from kd_plugin.divergences import measures

overlap = measures.Measure("overlap", lambda row: (row.q * row.p).sqrt())
excess = measures.Measure("excess", lambda row: (row.q - row.p).square(), lambda lq, q: q.square())
measures.MEASURES += (overlap, excess)
measures.MEASURED = tuple(measure.name for measure in measures.MEASURES)

import kd_plugin as kd
from kd_plugin.distributed.vocab_slice import cut
from kd_plugin.exchange.vocab_parallel import VocabParallelDistill
from kd_plugin.loss import from_hidden
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.output import normalised, packed
from kd_plugin.training.tensorboard import tagged

V, SHARED = 23, 19
torch.manual_seed(0)
hidden, weight = torch.randn(7, 5), torch.randn(V, 5)
teacher_hidden, teacher_weight = torch.randn(7, 3), torch.randn(SHARED, 3)
targets = torch.randint(V, (7,))
q = torch.nn.functional.softmax(hidden.double() @ weight.double().T, -1)
p = torch.nn.functional.softmax(teacher_hidden.double() @ teacher_weight.double().T, -1)
p = torch.nn.functional.pad(p, (0, V - SHARED))
found = {"expected": {
    "overlap": (q * p).sqrt().sum(-1).mean().item(), "excess": (q - p).square().sum(-1).mean().item()
}}
inputs = hidden, weight, teacher_hidden, teacher_weight, targets
for kernel in ("eager", "compile", "triton"):
    config = kd.DistillConfig(row_kernel=kernel, chunk_size=3)
    metrics = kd.distill_loss(*inputs, config=config).metrics
    found[kernel] = {name: value.item() for name, value in metrics.items()}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = kd.DistillConfig(row_kernel="eager", chunk_size=3)
call = HeadCall(kd.HeadTeacher(teacher_hidden, teacher_weight), targets)
problem = from_hidden.make_problem(call, config, hidden, V, teacher_size=SHARED)
sums = VocabParallelDistill.apply(hidden, weight, None, problem, cut(V, SHARED, None), 1.0)
metrics = normalised(packed(*sums, problem), None).metrics
found["sharded"] = {name: value.item() for name, value in metrics.items()}
found["tags"] = sorted(tagged(found["eager"]))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process prints in which two entries were added to the list before all else."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", ADDED], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", ["eager", "compile", "triton", "sharded"])
def test_every_row_pass_measures_what_was_added_to_the_list(found: dict[str, Any], path: str) -> None:
    for name, expected in found["expected"].items():
        assert found[path][name] == pytest.approx(expected, rel=1e-5)
    assert found[path] == pytest.approx(found["eager"], rel=1e-5)


def test_what_was_added_to_the_list_has_a_tag(found: dict[str, Any]) -> None:
    assert {"distill/overlap", "distill/excess", "distill/kl_t1"} <= set(found["tags"])
