"""What a run asks its models before it packs: whether documents stay apart, seen in hidden states, by what, and else
it is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kd_plugin as kd
from kd_plugin.data.documents import load_documents
from kd_plugin.models.loading import build_student, load_teacher, load_tokenizer
from kd_plugin.settings.run import RunConfig
from kd_plugin.training import isolation
from tests.tiny_models import LAYER_TYPES, make_model
from tests.tiny_runs import make_teacher, run_config

SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}

LINEAR: dict[str, Any] = {
    **dict.fromkeys(("head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    "layer_types": ["linear_attention", "full_attention"],
}


def make_conversations(path: Path) -> Path:
    """Sixty documents of 5 to 60 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 60, (60,), generator=generator).tolist()
    letters = "abcdefghijklmnopqrstuvwxyz .,"
    rows = ["".join(letters[i] for i in torch.randint(29, (n,), generator=generator).tolist()) for n in lengths]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return path


def run_of(folder: Path, name: str, model: str, *, packing: str | None = None, **settings: Any) -> RunConfig:
    """Two steps of a run whose teacher is a `model` of two layers, and the student a fresh one."""
    if not (folder / "teacher").is_dir():
        make_teacher(folder / "teacher")  # the tokenizer
        made = make_model(model, seed=7, dtype=torch.float32, **{**SIZES, **settings})
        made.save_pretrained(folder / "teacher")
        make_conversations(folder / "text.jsonl")
    data = {"train": str(folder / "text.jsonl"), "seq_len": 60, **({"packing": packing} if packing else {})}
    student = {"from_teacher": None, "from_config": {"num_hidden_layers": 2}}
    train = {"max_steps": 2, "tokens_per_step": 4 * 60, "parallel": "single", "export": False}
    return run_config(folder, name, data=data, train=train, student=student)


@pytest.mark.parametrize(
    ("model", "settings", "way"),
    [
        ("llama", {}, "by positions"),
        ("gemma3", {"sliding_window": 8, "layer_types": LAYER_TYPES}, "by positions"),
        ("bloom", {}, "by its attention masks"),
        ("gpt_oss", {}, "by its attention masks"),
    ],
)
def test_the_way_is_found_on_the_real_models(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, settings: dict[str, Any], way: str
) -> None:
    with caplog.at_level(logging.INFO):
        result = kd.train(run_of(tmp_path, "run", model, **settings))
    for side in ("student", "teacher"):
        assert f"data.packing isolated: the {side} keeps documents apart {way}" in caplog.text
    assert result.step == 2 and len(result.history) == 2


@pytest.mark.parametrize(
    ("model", "settings", "layer"),
    [
        ("Qwen3NextForCausalLM", LINEAR, "Qwen3NextGatedDeltaNet"),
        pytest.param("MambaForCausalLM", {"state_size": 8}, "MambaMixer", marks=pytest.mark.slow),
    ],
)
def test_a_model_that_cannot_is_refused_by_name_and_runs_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model: str, settings: dict[str, Any], layer: str
) -> None:
    with pytest.raises(isolation.IsolationError) as caught:
        kd.train(run_of(tmp_path, "run", model, **settings))
    message = str(caught.value)
    for words in (
        f"the student ({model}",
        f"the teacher ({model}",
        f"{layer} carry a state",
    ):
        assert words in message
    assert message.endswith("set data.packing to joined, where each reads what stands before it")
    assert not (tmp_path / "run" / "checkpoints").exists()
    with caplog.at_level(logging.INFO):
        assert kd.train(run_of(tmp_path, "joined", model, packing="joined", **settings)).step == 2
    assert "keeps documents apart" not in caplog.text


def leaking(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A last norm that adds a hundredth of the token before, across documents."""

    def changed(hidden: Tensor) -> Tensor:
        return forward(hidden + 0.01 * torch.roll(hidden, 1, dims=1) * (torch.arange(hidden.shape[1]) > 0)[:, None])

    return changed


def without_restart(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Position embeddings that count through all documents."""

    def changed(position_ids: Tensor) -> Tensor:
        return forward(torch.arange(position_ids.shape[-1]).expand_as(position_ids))

    return changed


def without_window(model: nn.Module) -> None:
    """Sliding windows that are lost where positions are given."""
    for layer in model.model.layers:
        forward = layer.forward

        def changed(hidden: Tensor, *args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            positions, mask = kwargs["position_ids"], kwargs["attention_mask"]
            if (positions.diff() < 0).any():
                documents = (positions == 0).cumsum(-1)
                both = documents[:, None, :, None] == documents[:, None, None, :]
                mask = both & torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
            return forward(hidden, *args, **{**kwargs, "attention_mask": mask})

        layer.forward = changed


@pytest.mark.parametrize("fault", ["a leak from token to token", "positions", "window"])
def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """On the student only, whatever way is tried; without the fault each of them runs (above)."""
    name = {"positions": "gpt2", "window": "gemma3"}.get(fault, "llama")
    window = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2} if fault == "window" else {}
    config = run_of(tmp_path, "run", name, **window)
    from kd_plugin.training import run

    build = run.build_student

    def broken(*args: Any, **kwargs: Any) -> Any:
        student = build(*args, **kwargs)
        if fault == "positions":
            student.transformer.wpe.forward = without_restart(student.transformer.wpe.forward)
        elif fault == "window":
            without_window(student)
        else:
            student.model.norm.forward = leaking(student.model.norm.forward)
        return student

    monkeypatch.setattr(run, "build_student", broken)
    with pytest.raises(
        isolation.IsolationError, match=r"^the student .* does not keep packed documents apart"
    ) as caught:
        kd.train(config)
    assert "the teacher" not in str(caught.value)


def test_a_run_without_a_teacher_asks_the_student_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_of(tmp_path, "run", "llama")
    distill = config.distill.model_copy(update={"soft_weight": 0.0, "hard_weight": 1.0})
    with caplog.at_level(logging.INFO):
        kd.train(config.model_copy(update={"distill": distill}))
    assert "the student keeps documents apart" in caplog.text and "the teacher keeps" not in caplog.text


def test_short_sequences_and_one_kind_of_token_can_be_asked_about() -> None:
    for seq_len in range(2, 40):
        for window in (0, 3, 8, 100):
            lengths = isolation._lengths(seq_len, window)
            assert sum(lengths) <= seq_len and min(lengths) >= 1 and len(lengths) in (2, 3)
    first, second = isolation._ids(torch.full((9,), 5).numpy(), 29)
    assert (first != second).all() and {*first.tolist(), *second.tolist()} == {4, 5}


def test_a_run_that_goes_on_with_other_packing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_of(tmp_path, "run", "llama")
    train = config.train.model_copy(update={"save_every": 1, "max_steps": 1})
    kd.train(config.model_copy(update={"train": train}))
    train = config.train.model_copy(update={"resume": True})
    data = config.data.model_copy(update={"packing": "joined"})
    kd.train(config.model_copy(update={"train": train, "data": data}))
    assert "resume: section data differs from the one that wrote" in caplog.text and "(packing)" in caplog.text


def test_evaluation_measures_each_held_out_document_by_itself(tmp_path: Path) -> None:
    config = run_of(tmp_path, "run", "bloom")
    found = kd.train(config.model_copy(update={"train": config.train.model_copy(update={"eval_sequences": None})}))
    teacher = load_teacher(config.teacher)
    student = build_student(config.student, teacher, seed=config.train.seed).eval()
    _, held_out = load_documents(config.data, load_tokenizer(config.teacher))
    total, count = 0.0, 0
    for document in held_out:
        for ids in torch.tensor(document.input_ids, dtype=torch.long).split(60):
            with torch.no_grad():
                logits = student(input_ids=ids[None]).logits[0, :-1]
            total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(ids) - 1
    assert found.before["hard_loss"] == pytest.approx(total / count, rel=1e-5)
