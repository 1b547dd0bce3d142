"""Attached models used in ways that would train something else than meant, without anything failing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import kd_plugin as kd
from kd_plugin.exchange.mode import Exchange
from tests.tiny_models import make_batch, make_model

CONFIG = kd.DistillConfig(row_kernel="eager", chunk_size=7)


def models() -> tuple[nn.Module, nn.Module]:
    return make_model("llama", seed=1).train(), make_model("llama", seed=2)


class TestAnotherHeadAfterAttach:
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_is_named_with_the_order_to_keep(self, side: str) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        {"student": student, "teacher": teacher}[side].resize_token_embeddings(70)
        with pytest.raises(ValueError, match=f"the {side}'s head was replaced after attach.*detach") as caught:
            student(**make_batch())
        assert "\n" not in str(caught.value)

    def test_stays_when_detached_and_serves_when_attached_again(self) -> None:
        student, teacher = models()
        plugin = kd.attach(student, teacher, CONFIG)
        student.resize_token_embeddings(70)
        plugin.detach()
        assert student.get_output_embeddings().out_features == 70
        batch = make_batch()
        assert student(**batch).logits.shape[-1] == 70
        kd.attach(student, teacher, CONFIG)
        assert student(**batch).loss.isfinite()


class TestAnExchangeThatCannotBe:
    @pytest.mark.parametrize("mode", ["logits", "stats"])
    def test_in_one_process_it_is_said_once(self, mode: str, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG.model_copy(update={"exchange": mode}))
        with caplog.at_level(logging.INFO, "kd_plugin"):
            for _ in range(2):
                student(**make_batch())
        said = [record.getMessage() for record in caplog.records if "exchange" in record.getMessage()]
        assert said == [f"distill.exchange: {mode} has no effect: one process exchanges nothing"]

    def test_statistics_of_an_offloaded_student(self) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        try:
            weight = distribute_tensor(torch.randn(8, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
            on_gpu = torch.empty(3, 4, device="meta")  # where there is none
            for mode in ("auto", "weight", "logits"):
                exchange = Exchange(CONFIG.model_copy(update={"exchange": mode}), None)
                assert exchange.cuts_vocabulary(on_gpu, weight, 8) == (mode == "logits")
            refusing = Exchange(CONFIG.model_copy(update={"exchange": "stats"}), None)
            with pytest.raises(ValueError, match=r"keeps them on cpu.*on meta: possible are weight and logits"):
                refusing.cuts_vocabulary(on_gpu, weight, 8)
        finally:
            dist.destroy_process_group()


class TestWhatIsNotEvenOfTheRightKind:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"student": "path/of/a/student"}, "the student is a str; wanted a loaded model"),
            ({"student": None}, "the student is a NoneType; wanted a loaded model"),
            ({"teacher": "path/of/a/teacher"}, "the teacher is a str; wanted a loaded model"),
            ({"config": {"temperature": 2.0}}, "config is a dict; wanted kd_plugin.DistillConfig"),
            ({"tokenizers": ("a", "b")}, "the student's tokenizer is a str; wanted a loaded one"),
        ],
    )
    def test_of_attach(self, change: dict[str, Any], message: str) -> None:
        student, teacher = models()
        with pytest.raises(ValueError, match=message):
            kd.attach(**{"student": student, "teacher": teacher, "config": CONFIG, **change})

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([0, 1], "loss_rows is list; wanted the flat indices"),
            (torch.tensor([[0, 1]]), r"loss_rows is torch.int64 \(1, 2\); wanted the flat indices"),
            (torch.tensor([True] * 18), r"loss_rows is torch.bool \(18,\); wanted the flat indices"),
            (torch.tensor([0.0]), r"loss_rows is torch.float32 \(1,\); wanted the flat indices"),
            (torch.tensor([0, 1, 0]), "lists a row twice"),
            (torch.tensor([1, 0, 5, 0]), "lists a row twice"),
            (torch.tensor([-1]), "has index -1, but the rows are 0 to 17"),
            (torch.tensor([18]), "has index 18, but the rows are 0 to 17"),
        ],
    )
    def test_of_loss_rows(self, rows: Any, message: str) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        with pytest.raises(ValueError, match=message):
            student(**make_batch(), loss_rows=rows)

    def test_as_many_rows_as_there_are_but_one_of_them_twice(self) -> None:
        """Their number alone would say that all rows count."""
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        with pytest.raises(ValueError, match="lists a row twice"):
            student(**make_batch(), loss_rows=torch.arange(18) // 2 * 2)

    def test_rows_in_another_order_are_the_same_rows(self) -> None:
        student, teacher = models()
        batch = make_batch()
        kd.attach(student, teacher, CONFIG)
        expected = student(**batch).loss.item()
        rows = (
            torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten().ne(-100).nonzero().flatten()
        )
        for given in (rows, rows.flip(0), rows.int()):
            assert student(**batch, loss_rows=given).loss.item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": [[1, 2]]}, r"labels is a list; wanted an int64 tensor \[B, S\]"),
            ({"token_weights": [1.0]}, "token_weights is a list; wanted a tensor"),
            ({"num_items_in_batch": "13"}, "num_items is a str; wanted the number of tokens"),
        ],
    )
    def test_of_a_forward(self, change: dict[str, Any], message: str) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        with pytest.raises(ValueError, match=message):
            student(**{**make_batch(), **change})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (({"train": {}},), "wants the path of a YAML file, found a dict"),
            (("x.yaml", {"train.lr": 1e-4}), r'wants overrides as "section.key=value".*found a dict'),
        ],
    )
    def test_of_load_config(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(kd.ConfigError, match=message):
            kd.load_config(*arguments)


def test_an_adapter_put_on_the_head_after_attach_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    student, teacher = models()
    kd.attach(student, teacher, CONFIG)
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="get_peft_model first, then attach"):
        adapted(**make_batch())


class TestWhatIsPutOnAfterAttach:
    """Of a head it is refused where it would change the logits; of a whole model it is said by name."""

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_hook_on_the_whole_model(self, side: str, caplog: pytest.LogCaptureFixture) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        (student if side == "student" else teacher).register_forward_hook(lambda module, args, output: None)
        for _ in range(2):
            student(**make_batch())
        said = [record.getMessage() for record in caplog.records if "was put on after attach()" in record.getMessage()]
        assert len(said) == 1 and said[0].startswith(f"a forward hook on the whole {side} (tests.plugin.test_misuse.")

    @pytest.mark.parametrize(("home", "said"), [("deepspeed.runtime.zero", 0), ("my_project.hooks", 1)])
    def test_a_hook_of_a_library_is_not_said(self, home: str, said: int, caplog: pytest.LogCaptureFixture) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            pass

        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        hook.__module__ = home
        student.register_forward_hook(hook)
        student(**make_batch())
        assert caplog.text.count("was put on after attach()") == said

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_another_forward_of_the_head(self, side: str) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        head = (student if side == "student" else teacher).get_output_embeddings()
        head.forward = lambda hidden: hidden @ head.weight.T
        with pytest.raises(ValueError, match=f"the forward of the {side}'s head was replaced after attach"):
            student(**make_batch())

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_pre_hook_on_the_head_that_drops_what_it_does_not_know(self, side: str) -> None:
        student, teacher = models()
        kd.attach(student, teacher, CONFIG)
        head = (student if side == "student" else teacher).get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        with pytest.raises(
            ValueError, match=f"a forward pre-hook on the {side}'s head has dropped its second argument"
        ):
            student(**make_batch())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_that_never_come_are_named(side: str) -> None:
    student, teacher = models()
    (student if side == "student" else teacher).to("meta")
    kd.attach(student, teacher, CONFIG)
    with pytest.raises(ValueError, match="weights of the LlamaForCausalLM are still on the meta device: load them"):
        student(**make_batch())


def test_tokenizers_are_a_pair() -> None:
    with pytest.raises(ValueError, match="tokenizers is a str; wanted a pair"):
        kd.attach(*models(), CONFIG, tokenizers="a")


def test_a_loss_of_its_own_that_reads_labels_otherwise_is_named() -> None:
    """A second head with labels of its own, as in models that predict several tokens."""
    student, teacher = models()
    forward = student.forward

    def with_second_head(input_ids: torch.Tensor, labels: Any = None, **kwargs: Any) -> Any:
        output = forward(input_ids=input_ids, labels=labels, **kwargs)
        if labels is not None:
            second = student.model.embed_tokens(input_ids) @ student.model.embed_tokens.weight.T
            rows = second[:, :-2].flatten(0, 1)
            output.loss = output.loss + torch.nn.functional.cross_entropy(rows, labels[:, 2:].flatten())
        return output

    student.forward = with_second_head
    kd.attach(student, teacher, CONFIG)
    with pytest.raises(ValueError, match=r"adds a loss of its own .* cannot be read off: .*batch_size"):
        student(**make_batch())
