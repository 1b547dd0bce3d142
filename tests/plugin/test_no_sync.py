"""A step whose rows the collator has counted asks the device for nothing: no `.item()`, no `nonzero`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kd_plugin as kd
from kd_plugin.data.packing import Batch, collate
from kd_plugin.data.paired import PairedDataset
from kd_plugin.loss import checks
from tests.data_pairs import make_pairs
from tests.tiny_models import VOCAB, make_model

# Operators whose result the host must wait for on a GPU, by their shape or by their value.
WAITING = {
    *("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select"),
    *("aten.unique_consecutive", "aten._unique2", "aten.unique_dim", "aten.repeat_interleave"),
}


# Methods that read values without an operator of their own.
READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class Waits(TorchDispatchMode):
    """Names of the operators run that make the host wait; an index by truth values is a nonzero in disguise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        by_mask = name.startswith("aten.index") and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:])
        )
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Adds to `found` the methods of tensors that copy values to the host."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at only where the host can read it, a CPU, is not looked at here."""
    monkeypatch.setattr(checks, "free_to_read", lambda tensor: False)


@pytest.fixture(autouse=True)
def without_the_backbones_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers itself reads the device twice where no attention mask is given: it looks for packed sequences
    among the positions, and for padding among the ids. Everything else in its models stays."""
    from transformers import PreTrainedModel, masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *args: None)


def make_batch(ignored: float = 0.3) -> Batch:
    generator = np.random.default_rng(0)
    items = []
    for _ in range(3):
        ids = generator.integers(3, VOCAB, 17)
        items.append({"input_ids": ids, "labels": np.where(generator.random(17) < ignored, -100, ids)})
    return collate(items)


@pytest.fixture(params=["llama", "llama_tied", "qwen3", "gpt2", "gemma2", "opt"])
def models(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, nn.Module]]:
    yield tuple(make_model(request.param, seed=seed, dtype=torch.float32) for seed in (1, 2))


def waits_of(student: nn.Module, inputs: dict[str, object]) -> list[str]:
    student.zero_grad()
    with Waits() as waits, Reads(waits.found):
        student(**inputs).loss.backward()
    return waits.found


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_with_rows_and_their_number_given_nothing_waits(models: tuple[nn.Module, nn.Module], ignored: float) -> None:
    student, teacher = models
    plugin = kd.attach(student, teacher, kd.DistillConfig(temperature=2.0, chunk_size=8, row_kernel="eager"))
    batch = make_batch(ignored)
    for num_items in (batch.num_valid, torch.tensor(batch.num_valid)):
        assert waits_of(student, {**batch.model_inputs(), "num_items_in_batch": num_items}) == []
        assert student.get_output_embeddings().weight.grad.any()
    assert plugin.metrics()["valid_tokens"] == 2 * batch.num_valid  # reads the device, once per log step


def test_without_them_it_does_wait(models: tuple[nn.Module, nn.Module]) -> None:
    """The measurement would notice: counting the rows is a `nonzero`, checking the labels a `tolist`."""
    student, teacher = models
    kd.attach(student, teacher, kd.DistillConfig(chunk_size=8, row_kernel="eager"))
    batch = make_batch()
    found = waits_of(student, {"input_ids": batch.input_ids, "labels": batch.labels})
    assert "aten.nonzero" in found and "tolist" in found


OBJECTIVES: dict[str, dict[str, object]] = {
    "every divergence": {
        "terms": [
            {"name": name, "temperature": 1.0 + i % 3}
            for i, name in enumerate(("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"))
        ]
    },
    "distances of logits": {"terms": [{"name": name} for name in ("logit_mse", "logit_mse_centered", "cosine")]},
    "acceptance": {"divergence": "acceptance"},
    "uld": {"divergence": "uld"},
    "smoothed": {"label_smoothing": 0.1, "z_loss_weight": 1e-3},
    "hard only": {"soft_weight": 0.0},
    "soft only": {"hard_weight": 0.0},
    "rounded logits": {"logits_dtype": "input"},
    "automatic chunks": {"chunk_size": "auto", "loss_memory_mb": 1},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_waits(objective: str) -> None:
    student, teacher = (make_model("llama", seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    settings = {"chunk_size": 8, "row_kernel": "eager", **OBJECTIVES[objective]}
    kd.attach(student, teacher, kd.DistillConfig(**settings))
    batch = make_batch()
    weights = torch.rand(batch.labels.shape)
    inputs = {**batch.model_inputs(), "num_items_in_batch": batch.num_valid, "token_weights": weights}
    assert waits_of(student, inputs) == []


def scored_items() -> list[dict[str, np.ndarray]]:
    """Sequences of which every token counts in the soft loss, and some have a label."""
    generator = np.random.default_rng(1)
    ids = generator.integers(3, VOCAB, (3, 17))
    labels = np.where(generator.random((3, 17)) < 0.6, -100, ids)
    return [{"input_ids": x, "labels": y, "scored": np.ones(17, dtype=bool)} for x, y in zip(ids, labels, strict=True)]


@pytest.mark.parametrize("tensors", [False, True])
def test_the_soft_loss_on_all_tokens_waits_for_nothing(tensors: bool) -> None:
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    kd.attach(student, teacher, kd.DistillConfig(chunk_size=8, row_kernel="eager", soft_on="all"))
    batch = collate(scored_items())
    assert batch.num_trained < batch.num_valid == 3 * 16
    counts = {"num_items_in_batch": batch.num_trained, "soft_items_in_batch": batch.num_valid}
    given = {name: torch.tensor(count) if tensors else count for name, count in counts.items()}
    assert waits_of(student, {**batch.model_inputs(), **given}) == []


def test_a_teacher_that_reads_another_text_is_waited_for_by_nobody() -> None:
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    kd.attach(student, teacher, kd.DistillConfig(chunk_size=8, row_kernel="eager"))
    dataset = PairedDataset(make_pairs(), 24)
    batch = collate([dataset[index] for index in range(3)])
    assert waits_of(student, {**batch.model_inputs(), "num_items_in_batch": batch.num_valid}) == []


def test_item_is_seen_in_forward_and_backward() -> None:
    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda grad: grad * float(grad.sum()))
    with Waits() as waits, Reads(waits.found):
        assert y.sum().item() == 6
        y.sum().backward()
        x.detach()[x > 0].tolist()
    assert waits.found == ["aten._local_scalar_dense", "aten._local_scalar_dense", "aten.index", "tolist"]


def test_gradients_accumulate_without_waiting() -> None:
    """Two micro-batches whose losses are added, with a loss scale on the device."""
    student, teacher = (make_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
    kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    batch, scale = make_batch(), torch.tensor(1024.0)
    inputs = {**batch.model_inputs(), "num_items_in_batch": 2 * batch.num_valid}
    with Waits() as waits, Reads(waits.found):
        for _ in range(2):
            (scale * student(**inputs).loss).backward()
    assert waits.found == []
