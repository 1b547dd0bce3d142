"""Masks that keep packed documents apart: counted with the models' own code, and measured in real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kd_plugin as kd
from kd_plugin.estimate.account import Estimate, estimate
from kd_plugin.estimate.sizes import load_sizes
from kd_plugin.loss.buffers import release_workspace
from kd_plugin.models.loading import build_student, load_teacher
from kd_plugin.settings.run import RunConfig
from tests.allocations import allocator_record
from tests.round_speeds import SPEEDS
from tests.tiny_runs import make_folder, run_config

BATCH, LENGTH, LAYERS = 2, 127, 3
SQUARE = BATCH * LENGTH**2  # elements of a mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def config_of(folder: Path, packing: str, attention: str = "sdpa", **train: Any) -> RunConfig:
    times = train.pop("times", 1)
    model = {"dtype": "float32", "attn_implementation": attention}
    return run_config(
        folder,
        student={**model, "from_teacher": {"layers": LAYERS}},
        teacher={**model, "micro_batch_size": times * BATCH},
        data={"packing": packing, "seq_len": LENGTH},
        train={
            **{"micro_batch_size": BATCH, "tokens_per_step": times * BATCH * LENGTH, "parallel": "single"},
            **train,
        },
    )


def packed() -> dict[str, Tensor]:
    """Ids and positions of sequences of five documents each."""
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH).remainder(LENGTH // 5).expand(BATCH, -1).clone()
    return {"input_ids": ids, "position_ids": positions}


def estimated(config: RunConfig) -> Estimate:
    return estimate(config, device="cpu", speeds=SPEEDS, rows=BATCH * (LENGTH - 1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", ["isolated", "joined"])
def test_activations_are_those_that_autograd_keeps_under_masks(folder: Path, attention: str, packing: str) -> None:
    student = build_student(config_of(folder, packing, attention).student, load_teacher_of(folder, attention), seed=0)
    counted = load_sizes(config_of(folder, packing, attention))[0].activations
    assert counted is not None
    parameters = {parameter.untyped_storage().data_ptr() for parameter in student.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = packed()
    if packing == "joined":
        del inputs["position_ids"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = student.train().base_model(**inputs, use_cache=False)
    assert out.last_hidden_state.requires_grad
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert sum(counted.layers) + counted.outside == pytest.approx(real, rel=0.1)


def load_teacher_of(folder: Path, attention: str) -> Any:
    return load_teacher(config_of(folder, "joined", attention).teacher)


@pytest.mark.parametrize(("attention", "shared", "own"), [("sdpa", 1, 4), ("eager", 4, 0)])
def test_masks_are_of_truth_values_and_made_additive_in_each_layer_or_additive_once(
    folder: Path, attention: str, shared: int, own: int
) -> None:
    apart, joined = (
        [sizes.activations for sizes in load_sizes(config_of(folder, packing, attention))]
        for packing in ("isolated", "joined")
    )
    for with_masks, without in zip(apart, joined, strict=True):
        assert with_masks is not None and without is not None
        assert with_masks.masks == shared * SQUARE
        assert without.masks == (0 if attention == "sdpa" else shared * SQUARE)  # eager attention has one anyway
        for a, b in zip(with_masks.layers, without.layers, strict=True):
            # Beside it keys and values that masked attention wants for every head, and rotations by sequence.
            assert 0 <= a - b - own * SQUARE <= 2 * without.boundary


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_backends_without_dense_masks_have_none(folder: Path, attention: str) -> None:
    for packing in ("isolated", "joined"):
        for sizes in load_sizes(config_of(folder, packing, attention)):
            assert sizes.activations is not None and sizes.activations.masks == 0


def peak_of(config: RunConfig, times: int) -> int:
    """Bytes at the peak of a step above what is held before, its gradients among it."""
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, teacher, seed=0).train()
    if config.train.activation_checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    plugin = kd.attach(student, teacher, config.distill)
    for side in plugin.sides.values():
        side.isolation = "position_ids"
    given = packed()
    if config.data.packing == "joined":
        del given["position_ids"]
    batches = [{name: value.clone() for name, value in given.items()} for _ in range(times)]
    batches = [{**batch, "labels": batch["input_ids"]} for batch in batches]

    def step() -> None:
        if times > 1:
            plugin.teacher_ahead(batches)
        for batch in batches:
            student(**batch, num_items_in_batch=1).loss.backward()

    step()  # makes the gradients
    peaks = []
    for _ in range(3):
        release_workspace()
        peaks.append(allocator_record(step)[1])
    return min(peaks)


@pytest.mark.parametrize(("times", "recomputed"), [(1, False), (3, False), (1, True)])
def test_what_masks_add_to_the_peak_of_a_step_is_estimated(folder: Path, times: int, recomputed: bool) -> None:
    measured, counted = [], []
    for packing in ("isolated", "joined"):
        config = config_of(folder, packing, times=times, activation_checkpointing=recomputed)
        memory = estimated(config).memory
        counted.append(memory.phase_bytes(memory.worst_phase))
        measured.append(peak_of(config, times))
    assert counted[0] - counted[1] == pytest.approx(measured[0] - measured[1], rel=0.15)
    assert counted[0] - counted[1] > (1 + 4) * SQUARE
    assert counted[0] == pytest.approx(measured[0], rel=0.15)


def test_masks_are_said_where_they_are_held(folder: Path) -> None:
    """The teacher's in its forward, of all micro-batches at once; the student's where layers are recomputed."""
    memory = estimated(config_of(folder, "isolated", times=3, activation_checkpointing=True)).memory
    lines = {line.name: line.num_bytes for line in memory.phases["teacher forward"]}
    assert lines["teacher, attention masks"] == 3 * SQUARE
    lines = {line.name: line.num_bytes for line in memory.phases["loss"]}
    assert lines["student, attention masks"] == SQUARE and "teacher, attention masks" not in lines
