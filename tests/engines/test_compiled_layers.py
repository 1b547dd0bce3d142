"""Decoder layers that are compiled: the same numbers, one graph for ragged batches, and eager where it fails."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import kd_plugin as kd
from kd_plugin.distributed import compiler_internals
from kd_plugin.engines.compiled_layers import compile_layers
from kd_plugin.models.adapters import add_adapters
from kd_plugin.settings.lora import LoraConfig
from tests import experts
from tests.tiny_models import VOCAB, assert_same_gradients, gradients_of, make_model

# torch.compile itself reads it
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
CONFIG = kd.DistillConfig(chunk_size=7, row_kernel="eager", temperature=1.3)
# Sequences, their length. Neither 1, which is a graph of its own, nor always unlike each other or the width of a head.
SIZES = [(3, 9), (2, 13), (8, 8), (5, 8), (4, 32), (2, 2), (7, 11), (3, 17), (9, 5), (2, 31)]
SIZES += [(6, 7), (4, 4), (2, 16), (5, 21), (3, 6), (11, 3), (8, 10), (2, 27), (5, 5), (10, 12)]


def graphs_of_layers() -> int:
    return counters["stats"]["unique_graphs"]


def ragged(index: int, rows: int, length: int, vocab_size: int = VOCAB) -> dict[str, Tensor]:
    """Sequences of which the first is padded, such that all sizes need a mask."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph of an earlier test may be found; what is captured runs as it is, which takes no compiler's time."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiler_internals, "inductor", lambda graph, inputs: graph.forward)


def attached(make: Callable[[int], nn.Module], *, compiled: bool, recomputed: bool = False) -> nn.Module:
    """A student in training mode with its teacher."""
    student, teacher = make(1), make(2)
    kd.attach(student, teacher, CONFIG)
    if recomputed:
        student.activation_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers({"student": student, "teacher": teacher})
    return student.train()


def assert_same(found: nn.Module, wanted: nn.Module, batch: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Losses with and without gradients, and the gradients."""
    losses: list[float] = []

    def loss_of(model: nn.Module) -> Tensor:
        loss = model(**batch).loss
        losses.append(loss.item())
        return loss

    gradients = [gradients_of(model, lambda model=model: loss_of(model)) for model in (found, wanted)]
    assert_same_gradients(*gradients, tolerance)
    with torch.no_grad():
        losses += [model.eval()(**batch).loss.item() for model in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[2] == pytest.approx(losses[3], rel=tolerance)
    for model in (found, wanted):
        model.train()


def test_twenty_ragged_batches_take_the_graphs_of_the_first(captured: None) -> None:
    found, wanted = (attached(lambda seed: make_model("llama", seed=seed), compiled=flag) for flag in (True, False))
    after = []
    for index, size in enumerate(SIZES):
        assert_same(found, wanted, ragged(index, *size))
        after.append(graphs_of_layers())
    assert after[0] > 0 and after == after[:1] * 20


def with_adapters(seed: int) -> nn.Module:
    """Random ones: a zero lora_B would hide what goes wrong behind it."""
    model = make_model("llama", seed=seed)
    add_adapters(model, LoraConfig(r=3), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def test_adapters_above_a_frozen_embedding_take_two_graphs_and_warn_of_nothing(captured: None) -> None:
    """Into the first layer no gradient flows."""
    found, wanted = (attached(with_adapters, compiled=flag) for flag in (True, False))
    after = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The .grad attribute of a Tensor")
        for index in range(3):
            assert_same(found, wanted, ragged(index, *SIZES[index]))
            after.append(graphs_of_layers())
    assert after == after[:1] * 3


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "opt", "cohere", "granite")


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_its_own_numbers(captured: None, name: str, recomputed: bool) -> None:
    def make(seed: int) -> nn.Module:
        return make_model(name, seed=seed)

    found, wanted = (attached(make, compiled=flag, recomputed=recomputed) for flag in (True, False))
    before = graphs_of_layers()
    for index, size in enumerate(SIZES[:3]):
        assert_same(found, wanted, ragged(index, *size))
    assert graphs_of_layers() - before >= 2, "nothing was compiled"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_mixture_of_experts_breaks_its_graph_and_stays_right(
    captured: None, caplog: pytest.LogCaptureFixture, name: str, recomputed: bool
) -> None:
    def make(seed: int) -> nn.Module:
        return experts.make_mixture(name, seed=seed)

    with caplog.at_level(logging.INFO, "kd_plugin"):
        found, wanted = (attached(make, compiled=flag, recomputed=recomputed) for flag in (True, False))
        for index, size in enumerate(SIZES[:3]):
            assert_same(found, wanted, ragged(index, *size, vocab_size=experts.VOCAB), tolerance=1e-7)
    layer = name.removesuffix("ForCausalLM") + "DecoderLayer"
    warned = f"train.compile: torch.compile finds no graph in the student's {layer} with gradients, which runs eager"
    assert (warned in caplog.messages) == recomputed
    assert any(f"compiled the student's {layer} without gradients" in message for message in caplog.messages)


def test_the_log_names_the_layers_and_their_graphs(captured: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kd_plugin"):
        student = attached(lambda seed: make_model("llama", seed=seed, num_hidden_layers=1 + seed), compiled=True)
        for index in range(2):
            student(**ragged(index, *SIZES[index])).loss.backward()
    lines = [message for message in caplog.messages if message.startswith("train.compile")]
    assert lines[0].startswith("train.compile: compiling 2 layers of the student and 3 layers of the teacher as they")
    assert [line.rpartition(" in ")[0] for line in lines[1:]] == [
        "train.compile: compiled the student's LlamaDecoderLayer with gradients",
        "train.compile: compiled the teacher's LlamaDecoderLayer without gradients",
    ]
    assert all(line.endswith("graphs: 1") for line in lines[1:])


def test_nothing_but_the_forward_of_a_layer_changes(captured: None) -> None:
    before, model = make_model("gemma2"), make_model("gemma2")
    compile_layers({"student": model})
    assert model.state_dict().keys() == before.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]


def broken(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    raise KeyError("buf0")


def warned_of_eager(caplog: pytest.LogCaptureFixture, batches: int) -> str:
    """The one warning of layers that run eager, and as the plain ones."""
    with caplog.at_level(logging.INFO, "kd_plugin"):
        found, wanted = (attached(lambda seed: make_model("llama", seed=seed), compiled=flag) for flag in (True, False))
        for index, size in enumerate(SIZES[:batches]):
            assert_same(found, wanted, ragged(index, *size))
    (line,) = [message for message in caplog.messages if "cannot compile" in message]
    assert not any("compiled the" in message for message in caplog.messages)
    return line


def test_what_cannot_be_compiled_runs_eager_and_is_said_once(
    captured: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler_internals, "inductor", broken)
    line = warned_of_eager(caplog, batches=3)
    assert (
        line.startswith("train.compile: torch ") and "(KeyError: 'buf0')" in line and "train.compile to false" in line
    )


def test_what_cannot_be_captured_runs_eager_and_is_said_once(
    captured: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_frontend(*_: object, **__: object) -> Any:
        def raises(*_: object, **__: object) -> Any:
            raise torch._dynamo.exc.InternalTorchDynamoError("no such bytecode")

        return raises

    monkeypatch.setattr(compiler_internals, "compiled_alone", no_frontend)
    assert "no such bytecode" in warned_of_eager(caplog, batches=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_inductor_gives_the_same_for_every_ragged_batch(name: str, recomputed: bool) -> None:
    torch._dynamo.reset()

    def make(seed: int) -> nn.Module:
        return make_model(name, seed=seed, dtype=torch.float32)

    found, wanted = (attached(make, compiled=flag, recomputed=recomputed) for flag in (True, False))
    after = []
    for index, size in enumerate(SIZES):
        assert_same(found, wanted, ragged(index, *size), tolerance=2e-5)
        after.append(graphs_of_layers())
    assert after == after[:1] * 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_precision_is_as_near_as_eager() -> None:
    """To fp32: gradients of both, over several batches."""
    torch._dynamo.reset()

    def make(seed: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return make_model("llama", seed=seed).to(dtype)  # the same weights, rounded

    def exact(seed: int) -> nn.Module:
        return make(seed).to(torch.float32)

    found, eager, wanted = (
        attached(make, compiled=True),
        attached(make, compiled=False),
        attached(exact, compiled=False),
    )
    errors = [0.0, 0.0]
    for index, size in enumerate(SIZES[:5]):
        batch = ragged(index, *size)
        gradients = [gradients_of(model, lambda m=model, b=batch: m(**b).loss) for model in (found, eager, wanted)]
        for which in range(2):
            errors[which] += sum(
                float((gradients[which][name].float() - gradient).square().sum())
                for name, gradient in gradients[2].items()
            )
    assert 0 < errors[0] <= 1.2 * errors[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_compiler_there_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()

    def make(seed: int) -> nn.Module:
        return make_model("llama", seed=seed, dtype=torch.float32)

    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level(logging.INFO, "kd_plugin"):
        found, wanted = (attached(make, compiled=flag) for flag in (True, False))
        assert_same(found, wanted, ragged(0, 3, 9), tolerance=1e-6)
    (line,) = [message for message in caplog.messages if "cannot compile" in message]
    assert "CppCompile" in line or "Compiler" in line or "compiler" in line
