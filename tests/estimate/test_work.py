"""What a backbone does, counted without values, against the same model run with them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kd_plugin.estimate.sizes import ModelSizes, load_sizes
from kd_plugin.estimate.work import Op, Work
from tests.tiny_runs import make_folder, run_config

BATCH, LENGTH, LAYERS, WIDTH = 2, 32, 2, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def sizes(folder: Path, **student: object) -> tuple[ModelSizes, ModelSizes]:
    config = run_config(folder, student=student, data={"packing": "joined"}, train={"micro_batch_size": BATCH})
    return load_sizes(config)


def work(model: ModelSizes) -> Work:
    assert model.work is not None, model.why_unknown
    return model.work


def total(ops: Counter[Op], kind: str) -> float:
    return sum(op.flops * count for op, count in ops.items() if op.kind == kind)


def real_student(folder: Path, attention: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", attn_implementation=attention)
    model.model.layers = model.model.layers[:LAYERS]
    return model.base_model.train()


def test_products_are_those_of_the_real_model(folder: Path) -> None:
    """Eager attention on both sides, whose products the counter sees on a CPU too."""
    found = work(sizes(folder, attn_implementation="eager")[0])
    backbone, counts = real_student(folder, "eager"), []
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        hidden.backward(torch.ones_like(hidden))
    counts.append(counter.get_total_flops())
    assert [total(found.forward, "product"), total(found.backward, "product")] == counts
    assert total(found.forward, "attention") == 0


def test_fused_attention_computes_the_scores_below_the_diagonal(folder: Path) -> None:
    fused, eager = (work(sizes(folder, attn_implementation=name)[0]) for name in ("sdpa", "eager"))
    pairs = BATCH * LENGTH * (LENGTH + 1) / 2  # of a query and a key that it may see, for each head
    forward = LAYERS * 2 * 2 * pairs * WIDTH  # two products
    assert total(fused.forward, "attention") == forward
    assert total(fused.backward, "attention") == 2.5 * forward
    whole = total(eager.forward, "product") - total(fused.forward, "product")
    assert whole / forward == pytest.approx(2 * LENGTH / (LENGTH + 1))


def test_a_teacher_and_a_frozen_backbone_have_no_backward(folder: Path) -> None:
    student, teacher = sizes(folder, freeze=["model"])
    assert not work(teacher).backward and not work(student).backward
    assert total(work(teacher).forward, "product") == pytest.approx(2 * total(work(student).forward, "product"))


def test_a_frozen_weight_saves_its_gradients_product(folder: Path) -> None:
    whole, frozen = (work(sizes(folder, freeze=names)[0]) for names in ([], ["mlp"]))
    saved = total(whole.backward, "product") - total(frozen.backward, "product")
    weights = sum(p.numel() for name, p in real_student(folder, "sdpa").named_parameters() if ".mlp." in name)
    assert saved == 2 * BATCH * LENGTH * weights


def test_views_and_allocations_move_nothing(folder: Path) -> None:
    """An embedding reads the rows that it returns, not its whole weight."""
    student = sizes(folder)[0]
    states = BATCH * LENGTH * WIDTH * 4
    embedded = Op("memory", 0, 2 * states)
    assert work(student).forward[embedded] >= 1
    assert not any(op.num_bytes == 0 and op.flops for op in work(student).forward)
    residuals = Op("memory", 0, 3 * states)
    assert work(student).forward[residuals] >= 2 * LAYERS
