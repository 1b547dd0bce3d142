"""A teacher that runs ahead over several micro-batches gives each the loss that it would have had by itself."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import kd_plugin as kd
from kd_plugin.plugin.attach import Plugin
from tests.tiny_models import VOCAB, make_model

STEPS = 3


def micro_batches(lengths: tuple[int, ...], seed: int, *, masked: bool = False) -> list[dict[str, Tensor]]:
    """Two sequences each; `masked` leaves out the last three tokens of the first."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (2, length), generator=generator)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if masked:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, -3:] = 0
            batch["labels"][0, -3:] = -100
        batches.append(batch)
    return batches


class Attached:
    """A student with its teacher, of which the forwards are counted."""

    def __init__(self, name: str = "llama", dtype: torch.dtype = torch.float64, **settings: Any) -> None:
        self.student, self.teacher = (make_model(name, seed=seed, dtype=dtype) for seed in (1, 2))
        self.rows_read: list[int] = []
        embeddings = self.teacher.get_input_embeddings()
        embeddings.register_forward_hook(lambda _module, args, _output: self.rows_read.append(len(args[0])))
        config = kd.DistillConfig(**{"row_kernel": "eager", "chunk_size": 7, "temperature": 2.0, **settings})
        self.plugin: Plugin = kd.attach(self.student, self.teacher, config)
        self.rows_read.clear()  # what attach has tried out
        self.student.train()

    def step(self, batches: list[dict[str, Tensor]]) -> list[float]:
        losses = []
        for batch in batches:
            loss = self.student(**batch, num_items_in_batch=40).loss
            loss.backward()
            losses.append(loss.item())
        return losses

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.student.parameters() if parameter.grad is not None]


def run(
    lengths: tuple[int, ...], *, ahead: bool, together: int | None = None, masked: bool = False, **settings: Any
) -> tuple[list[float], list[Tensor], Attached]:
    """Losses of all micro-batches of several steps, the gradients that they leave, and who computed them."""
    attached, losses = Attached(**settings), []
    for step in range(STEPS):
        batches = micro_batches(lengths, step, masked=masked)
        if ahead:
            assert attached.plugin.teacher_ahead(batches, together) == (step > 0)
        losses += attached.step(batches)
    return losses, attached.gradients(), attached


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("together", [None, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_micro_batches_of_equal_length_have_the_same_losses_bit_for_bit(
    dtype: torch.dtype, together: int | None, masked: bool
) -> None:
    options: dict[str, Any] = {"masked": masked, "dtype": dtype}
    losses, gradients, _ = run((9, 9, 9), ahead=False, **options)
    found, others, attached = run((9, 9, 9), ahead=True, together=together, **options)
    assert found == losses
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
    reads = {None: [6], 2: [4, 2], 1: [2, 2, 2]}[together]
    assert attached.rows_read == [2, 2, 2, *reads * (STEPS - 1)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "opt"])
def test_those_of_other_lengths_are_padded_and_differ_by_rounding_alone(
    name: str, dtype: torch.dtype, tolerance: float, masked: bool
) -> None:
    options: dict[str, Any] = {"masked": masked, "dtype": dtype, "name": name}
    losses, gradients, _ = run((9, 5, 12), ahead=False, **options)
    found, others, _ = run((9, 5, 12), ahead=True, **options)
    assert found == pytest.approx(losses, rel=tolerance)
    largest = max(gradient.abs().max() for gradient in gradients)  # some are 0 but for rounding
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).abs().max() <= 5 * tolerance * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "opt"])
def test_padding_together_changes_no_more_than_padding_alone(
    name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """The error of hidden states against fp64, of each micro-batch alone, padded alone, and padded with others."""
    attached, batches = Attached(name, dtype), micro_batches((9, 5, 12), 0)
    attached.step(batches)
    with caplog.at_level(logging.INFO, "kd_plugin"):
        for _ in range(2):
            assert attached.plugin.teacher_ahead(batches)
    assert caplog.text.count("micro-batches of 5 to 12 tokens ahead, padded together in") == 1
    together = [kept.hidden for kept in attached.plugin._heads._ahead._kept.values()]
    attached.plugin.detach()
    exact = copy.deepcopy(attached.teacher).double()

    def hidden(model: nn.Module, ids: Tensor, length: int) -> Tensor:
        padded = nn.functional.pad(ids, (0, length - ids.shape[1]))
        mask = nn.functional.pad(torch.ones_like(ids), (0, length - ids.shape[1]))
        with torch.no_grad():
            output = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-1][:, : ids.shape[1]].reshape(-1, output.hidden_states[-1].shape[-1])

    for batch, found in zip(batches, together, strict=True):
        ids = batch["input_ids"]
        wanted = hidden(exact, ids, ids.shape[1])
        own, alone, with_others = (
            ((each.double() - wanted).norm() / wanted.norm()).item()
            for each in (hidden(attached.teacher, ids, ids.shape[1]), hidden(attached.teacher, ids, 12), found)
        )
        assert with_others <= 1.2 * max(own, alone) < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "uld", "logit_mse"])
def test_any_divergence_reads_what_was_kept(divergence: str) -> None:
    losses, _, _ = run((7, 7), ahead=False, divergence=divergence)
    assert run((7, 7), ahead=True, divergence=divergence)[0] == losses


def test_a_forward_with_other_tensors_runs_the_teacher_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    attached, batches = Attached(), micro_batches((9, 9), 0)
    attached.step(batches)
    copies = copy.deepcopy(batches)
    expected = attached.step(copies)
    for change in ("copied", "written to", "masked"):
        given = copy.deepcopy(batches)
        assert attached.plugin.teacher_ahead(given)
        read = len(attached.rows_read)
        if change == "copied":
            given = copy.deepcopy(given)
        elif change == "written to":
            for batch in given:
                batch["input_ids"].add_(0)
        else:
            for batch in given:
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with caplog.at_level(logging.WARNING, "kd_plugin"):
            assert attached.step(given) == pytest.approx(expected, rel=1e-12)
        assert attached.rows_read[read:] == [2, 2], change
    assert caplog.text.count("runs again: give the student the very tensors") == 1


def test_an_evaluation_between_reads_its_own_and_leaves_what_was_kept(caplog: pytest.LogCaptureFixture) -> None:
    attached, batches = Attached(), micro_batches((9, 9), 0)
    expected = attached.step(batches)
    held_out = micro_batches((6,), 7)
    with torch.no_grad():
        wanted = attached.student(**held_out[0]).loss.item()
    assert attached.plugin.teacher_ahead(batches)
    with torch.no_grad():
        assert attached.student(**held_out[0]).loss.item() == wanted
    read = len(attached.rows_read)
    assert attached.step(batches) == expected
    assert len(attached.rows_read) == read
    assert "runs again" not in caplog.text


def test_what_a_teacher_does_to_its_logits_since_counts() -> None:
    attached, batches = Attached("gemma2"), micro_batches((9, 9), 0)
    attached.step(batches)
    attached.teacher.config.final_logit_softcapping = 1.0
    expected = Attached("gemma2")
    expected.teacher.config.final_logit_softcapping = 1.0
    assert attached.plugin.teacher_ahead(batches)
    assert attached.step(batches) == pytest.approx(expected.step(batches), rel=1e-12)


def test_what_is_kept_is_forgotten_by_the_next_call() -> None:
    attached = Attached()
    attached.step(micro_batches((9,), 0))
    for step in range(3):
        assert attached.plugin.teacher_ahead(micro_batches((9, 9, 9), step))
    assert len(attached.plugin._heads._ahead._kept) == 3


def test_without_a_teacher_there_is_nothing_to_run() -> None:
    student = make_model("llama", seed=1)
    plugin = kd.attach(student, None, kd.DistillConfig(soft_weight=0.0, row_kernel="eager"))
    assert not plugin.teacher_ahead(micro_batches((9,), 0))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([{"inputs_embeds": torch.ones(1, 2, 3)}], "input_ids"),
        (
            [{"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(1, 2)}] * 2,
            "with pixel_values: run it with each",
        ),
        ([{"input_ids": torch.ones(1, 3)}, {"input_ids": torch.ones(1, 3), "attention_mask": 1}], "different inputs"),
        ([{"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)}] * 2, "not of shape"),
    ],
)
def test_micro_batches_that_cannot_be_put_together_are_refused_by_name(
    batches: list[dict[str, Any]], words: str
) -> None:
    attached = Attached()
    attached.step(micro_batches((9,), 0))
    with pytest.raises(ValueError, match=words):
        attached.plugin.teacher_ahead(batches)


@pytest.mark.parametrize("together", [0, -1])
def test_fewer_than_one_at_once_are_refused(together: int) -> None:
    attached = Attached()
    attached.step(micro_batches((9,), 0))
    with pytest.raises(ValueError, match=f"together is {together}; wanted how many micro-batches"):
        attached.plugin.teacher_ahead(micro_batches((9, 9), 0), together)


def test_no_micro_batches_and_a_while_without_soft_loss_ask_no_teacher() -> None:
    attached = Attached()
    attached.step(micro_batches((9,), 0))
    read = len(attached.rows_read)
    assert not attached.plugin.teacher_ahead([])
    with attached.plugin.objective(kd.DistillConfig(soft_weight=0.0, row_kernel="eager")):
        assert not attached.plugin.teacher_ahead(micro_batches((9, 9), 0))
    assert len(attached.rows_read) == read


def test_padding_under_a_window_is_refused() -> None:
    attached = Attached("gemma2")
    attached.step(micro_batches((9,), 0))
    with pytest.raises(ValueError, match=r"micro-batches of 5, 9 tokens: its attention has a window .sliding_window."):
        attached.plugin.teacher_ahead(micro_batches((9, 5), 0))
    assert attached.plugin.teacher_ahead(micro_batches((9, 5), 0), together=1)


def test_packed_positions_under_flash_attention_are_refused() -> None:
    attached = Attached()
    attached.step(micro_batches((9,), 0))
    attached.teacher.config._attn_implementation_internal = "flash_attention_2"
    batch = {"input_ids": torch.full((1, 4), 3), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(ValueError, match="under flash attention"):
        attached.plugin.teacher_ahead([batch, batch])


def test_an_encoder_decoder_is_refused() -> None:
    student, teacher = (make_model("t5", seed=seed) for seed in (1, 2))
    plugin = kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    batch = micro_batches((9,), 0)[0]
    student(**batch).loss.backward()
    with pytest.raises(ValueError, match="encoder-decoder"):
        plugin.teacher_ahead([batch])


def test_a_head_that_hooks_fetch_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate's offloading does: it is whole inside its own forward alone."""
    attached, batches = Attached(), micro_batches((9, 9), 0)
    expected = attached.step(batches)
    head: nn.Module = attached.teacher.get_output_embeddings()
    monkeypatch.setattr(head, "_hf_hook", object(), raising=False)
    assert attached.plugin.teacher_ahead(batches)
    kept = list(attached.plugin._heads._ahead._kept.values())
    assert all(each.head is kept[0].head is not None for each in kept)
    monkeypatch.undo()
    with torch.no_grad():
        head.weight.zero_()  # as if it were gone
    assert attached.step(batches) == expected


def test_a_teacher_that_fsdp2_shards_over_one_rank_runs_ahead() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        attached, batches = Attached(), micro_batches((9, 9), 0)
        expected = attached.step(batches)
        other = Attached()
        fully_shard(other.teacher.get_output_embeddings())
        fully_shard(other.teacher)
        assert other.step(batches) == expected
        assert other.plugin.teacher_ahead(batches)
        assert other.step(batches) == expected
    finally:
        dist.destroy_process_group()
