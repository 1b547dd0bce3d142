"""LoRA students: adapters anywhere, the head included, train as peft's own whole logits would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests.allocations import NewTensors
from tests.loss_cases import config_of
from tests.tiny_models import assert_same_gradients, expected_loss, gradients_of, make_batch, make_model

HEAD = {"target_modules": ["q_proj", "lm_head"]}


def with_adapter(student: nn.Module, **settings: Any) -> peft.PeftModel:
    """The adapters have random weights: a zero lora_B would hide what goes wrong behind it."""
    dtype = next(student.parameters()).dtype
    settings = {"r": 3, "lora_alpha": 5, **HEAD, **settings}
    model = peft.get_peft_model(student, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).to(dtype)
    return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def seeded(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`loss` with the same dropout every time."""

    def run() -> Tensor:
        torch.manual_seed(7)
        return loss()

    return run


STUDENTS = {
    "inside": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "head": ("llama", HEAD),
    "only the head": ("llama", {"target_modules": ["lm_head"]}),
    "tied": ("llama_tied", HEAD),
    "softcap": ("gemma2", HEAD),
    "biases": ("phi", {**HEAD, "lora_bias": True}),
    "dropout": ("llama", {**HEAD, "lora_dropout": 0.4, "use_rslora": True}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved, tied": (
        "llama_tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_loss_and_gradients_equal_those_of_the_students_own_logits(name: str) -> None:
    architecture, settings = STUDENTS[name]
    student, teacher = with_adapter(make_model(architecture, seed=1), **settings).train(), make_model("llama", seed=2)
    config, batch = config_of("jsd", temperature=2.0, chunk_size=4), make_batch()
    dense = seeded(lambda: expected_loss(student, teacher, batch, config).loss)
    wanted, wanted_loss, keys = gradients_of(student, dense), dense().item(), list(student.state_dict())
    plugin = kd.attach(student, teacher, config)
    assert list(student.state_dict()) == keys
    attached = seeded(lambda: student(**batch).loss)
    assert attached().item() == pytest.approx(wanted_loss, rel=1e-6)
    assert_same_gradients(gradients_of(student, attached), wanted, tolerance=1e-6)
    assert plugin._student.vocab_size == 61
    plugin.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_keeps_adapters_in_fp32(dtype: torch.dtype) -> None:
    base, teacher = make_model("llama", seed=1, dtype=dtype), make_model("llama", seed=2, dtype=dtype)
    student = randomise(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **HEAD)))
    head, batch = student.get_output_embeddings(), make_batch()
    expected = expected_loss(student, teacher, batch, config_of()).loss.item()
    kd.attach(student, teacher, config_of())
    loss = student(**batch).loss
    loss.backward()
    # peft rounds the logits to bf16, the plugin does not
    assert loss.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)
    grads = [layers["default"].weight.grad for layers in (head.lora_A, head.lora_B)]
    assert all(grad.dtype == torch.float32 and grad.any() for grad in grads)
    assert head.base_layer.weight.grad is None


def test_several_adapters_add_up_and_are_chosen_by_call() -> None:
    student, teacher = with_adapter(make_model("llama", seed=1)), make_model("llama", seed=2)
    student.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    randomise(student).double()
    batch, config = make_batch(), config_of()
    active = [["default", "second"], ["second"], ["default"]]

    def losses(loss: Callable[[], Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for names in active:
            student.base_model.set_adapter(names)
            found.append(gradients_of(student, loss))
        return found

    wanted = losses(lambda: expected_loss(student, teacher, batch, config).loss)
    with student.disable_adapter():
        base = expected_loss(student, teacher, batch, config).loss.item()
    kd.attach(student, teacher, config)
    for pair in zip(losses(lambda: student(**batch).loss), wanted, strict=True):
        assert_same_gradients(*pair, tolerance=1e-6)
    with student.disable_adapter():
        assert student(**batch).loss.item() == pytest.approx(base, rel=1e-6)
    student.merge_adapter()
    merged = student(**batch).loss.item()
    student.unmerge_adapter()
    assert merged == pytest.approx(student(**batch).loss.item(), rel=1e-6) and merged != pytest.approx(base, rel=1e-3)


def test_disabling_uses_the_original_of_a_saved_head() -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    student, teacher = with_adapter(make_model("llama", seed=1), **settings), make_model("llama", seed=2)
    student.get_output_embeddings().modules_to_save["default"].weight.data *= 0.5
    batch, config = make_batch(), config_of()
    with student.disable_adapter():
        base = expected_loss(student, teacher, batch, config).loss.item()
    kd.attach(student, teacher, config)
    with student.disable_adapter():
        assert student(**batch).loss.item() == pytest.approx(base, rel=1e-6)
    assert student(**batch).loss.item() != pytest.approx(base, rel=1e-3)


@pytest.mark.parametrize("name", ["inside", "head", "saved"])
def test_another_objective_for_a_while_reaches_the_head_at_work(name: str) -> None:
    architecture, settings = STUDENTS[name]
    student, teacher = with_adapter(make_model(architecture, seed=1), **settings), make_model("llama", seed=2)
    batch, other = make_batch(), config_of("jsd", hard_weight=2.0)
    wanted = expected_loss(student, teacher, batch, other).loss.item()
    plugin = kd.attach(student, teacher, config_of())
    before = student(**batch).loss.item()
    with plugin.objective(other):
        assert student(**batch).loss.item() == pytest.approx(wanted, rel=1e-6)
    assert student(**batch).loss.item() == before != pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["head", "saved"])
def test_detach_gives_the_wrapper_back_and_peft_goes_on_working(name: str, tmp_path: Path) -> None:
    architecture, settings = STUDENTS[name]
    student, teacher = with_adapter(make_model(architecture, seed=1), **settings), make_model("llama", seed=2)
    inputs = {"input_ids": make_batch()["input_ids"]}
    before = {key: set(vars(module)) for key, module in student.named_modules()}
    kinds = {key: type(module) for key, module in student.named_modules()}
    logits = student(**inputs).logits
    plugin = kd.attach(student, teacher, config_of())
    assert torch.equal(student(**inputs).logits, logits)
    student(**make_batch()).loss.backward()
    student.save_pretrained(tmp_path / "attached", save_embedding_layers=False)
    plugin.detach()
    assert {key: type(module) for key, module in student.named_modules()} == kinds
    assert {key: set(vars(module)) for key, module in student.named_modules()} == before
    assert torch.equal(student(**inputs).logits, logits) and student(**make_batch()).logits is not None
    student.save_pretrained(tmp_path / "detached", save_embedding_layers=False)
    for folder in ("attached", "detached"):
        loaded = peft.PeftModel.from_pretrained(make_model(architecture, seed=1), tmp_path / folder).double()
        torch.testing.assert_close(loaded(**inputs).logits, logits)
    torch.testing.assert_close(student.merge_and_unload()(**inputs).logits, logits)


def test_a_merged_weight_is_never_built() -> None:
    vocab, width = 2003, 32
    student = with_adapter(make_model("llama", seed=1, dtype=torch.float32, vocab_size=vocab)).train()
    teacher = make_model("llama", seed=2, dtype=torch.float32, vocab_size=vocab)
    kd.attach(student, teacher, config_of(chunk_size=8))
    with NewTensors() as made:
        student(**make_batch(rows=4, length=30)).loss.backward()
    assert student.get_output_embeddings().lora_B["default"].weight.grad.any()
    assert 120 * width < vocab * 8 < vocab * width
    assert max(made.numels.values()) <= 8 * vocab


def test_other_ways_to_adapt_a_head_are_refused_by_name() -> None:
    teacher, base = make_model("llama", seed=2), make_model("llama", seed=1)

    def adapted(config: peft.PeftConfig) -> nn.Module:
        return peft.get_peft_model(copy.deepcopy(base), config)

    dora = adapted(peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **HEAD))
    with pytest.raises(ValueError, match=r"adapter 'default' on the student's head is of kind Dora.*target_modules"):
        kd.attach(dora, teacher, config_of())
    ia3 = adapted(peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"head is a peft\.tuners\.ia3\.layer\.Linear; wanted plain LoRA.*merge"):
        kd.attach(ia3, teacher, config_of())
    tokens = make_model("llama_tied", seed=1)
    tokens = peft.get_peft_model(tokens, peft.LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=[1, 2]))
    with pytest.raises(ValueError, match=r"TrainableTokensWrapper; wanted.*trainable_token_indices"):
        kd.attach(tokens, teacher, config_of())
    packed = make_model("llama", seed=1)
    packed.lm_head.weight = nn.Parameter(torch.zeros(61 * 16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"torch\.uint8 weights: keep the head out of quantisation"):
        kd.attach(packed, teacher, config_of())
    with pytest.raises(ValueError, match=r"teacher's head is a peft.*merge"):
        kd.attach(copy.deepcopy(base), with_adapter(make_model("llama", seed=2)), config_of())
    assert all("forward" not in vars(module) for module in teacher.modules())


def test_misuse_is_refused_in_one_line() -> None:
    student, teacher = with_adapter(make_model("llama", seed=1)), make_model("llama", seed=2)
    with pytest.raises(ValueError, match="the teacher is a part of the student"):
        kd.attach(student, student.get_base_model(), config_of())
    assert any(parameter.requires_grad for parameter in student.parameters())
    plugin = kd.attach(student, teacher, config_of())
    with pytest.raises(ValueError, match="attached already"):
        kd.attach(student, teacher, config_of())
    student.add_adapter("late", peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]))
    student.set_adapter("late")
    with pytest.raises(ValueError, match=r"adapter 'late' came after attach"):
        student(**make_batch())
    plugin.detach()
    plugin = kd.attach(student.double(), teacher, config_of())
    assert student(**make_batch()).loss.isfinite()


def test_prompts_before_the_text_are_refused() -> None:
    """Their rows have no labels, and the teacher would not see them."""
    student = peft.get_peft_model(
        make_model("llama", seed=1), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match=r"PROMPT_TUNING.*LoRA"):
        kd.attach(student, make_model("llama", seed=2), config_of())
