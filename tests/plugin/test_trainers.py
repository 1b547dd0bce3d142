"""Trainers of other libraries around an attached student: they distil, or are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import kd_plugin as kd
from tests.loss_cases import config_of
from tests.tiny_models import VOCAB, make_batch, make_model

CONFIG = config_of(row_kernel="eager")


def pair(dtype: torch.dtype = torch.float32, name: str = "llama") -> tuple[nn.Module, nn.Module, kd.Plugin]:
    student, teacher = make_model(name, seed=1, dtype=dtype).train(), make_model(name, seed=2, dtype=dtype)
    return student, teacher, kd.attach(student, teacher, CONFIG)


SHORT: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "report_to": [],
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCAB, (count, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def trainer(student: nn.Module, folder: Path, **options: Any) -> Trainer:
    function = options.pop("compute_loss_func", None)
    args = TrainingArguments(
        output_dir=str(folder),
        **SHORT,
        **options,
    )
    return Trainer(model=student, args=args, train_dataset=rows(), compute_loss_func=function)


@pytest.mark.parametrize("training", [True, False])
def test_what_was_said_before_excuses_no_trainer(tmp_path: Path, training: bool) -> None:
    """An unlabelled forward, to look at shapes say; also in eval mode, in which from_pretrained hands models out."""
    student, _, _ = pair()
    student.train(training)
    student(make_batch()["input_ids"])
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1"):
        trainer(student, tmp_path, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_trainer_distils(tmp_path: Path, options: dict[str, Any]) -> None:
    student, teacher, plugin = pair()
    calls: list[int] = []
    teacher.model.register_forward_hook(lambda *_: calls.append(1))
    trainer(student, tmp_path, **options).train()
    steps = 2 * options.get("gradient_accumulation_steps", 1)
    assert len(calls) == steps and plugin.metrics()["valid_tokens"] == steps * 4 * 8


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1: set it to 0, and DistillConfig\(label_smoothi"),
        ({"compute_loss_func": smoothed}, "keeps the labels for its compute_loss_func"),
    ],
    ids=["label_smoothing_factor", "compute_loss_func"],
)
def test_a_trainer_that_takes_the_labels_away_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    student, _, _ = pair()
    with pytest.raises(ValueError, match=words):
        trainer(student, tmp_path, **options).train()


def test_predictions_of_a_trainer_are_refused_and_an_evaluation_is_not(tmp_path: Path) -> None:
    """`predict` would give an empty tuple, and `compute_metrics` be called with one."""
    student, _, plugin = pair()
    of_student = trainer(student, tmp_path)
    assert of_student.evaluate(rows())["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"Trainer wants the student's logits \(predict.*prediction_loss_only=True"):
        of_student.predict(rows())
    of_student.compute_metrics = lambda prediction: {}
    with pytest.raises(ValueError, match=r"Trainer wants the student's logits .* compute_metrics"):
        of_student.evaluate(rows())
    of_student.args.prediction_loss_only = True
    assert of_student.predict(rows()).metrics["test_loss"] > 0
    of_student.args.prediction_loss_only = False
    plugin.detach()
    assert of_student.predict(rows()).predictions is not None


def test_a_trainer_without_labels_is_said_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student, _, _ = pair()

    class Rewarded(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
            return model(input_ids=inputs["input_ids"]).logits.square().mean()

    kind = trainer(student, tmp_path)
    Rewarded(model=student, args=kind.args, train_dataset=rows()).train()
    assert caplog.text.count("Rewarded gave the student no labels") == 1


def test_liger_in_the_trainer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = pytest.importorskip("liger_kernel.transformers.model.llama", exc_type=ImportError)

    def dense(hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return F.cross_entropy((hidden_states @ lm_head_weight.t())[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(llama, "LigerForCausalLMLoss", dense)  # its kernel needs a GPU; what calls it is Liger's own
    student, _, _ = pair()
    own = {"fused_linear_cross_entropy": True, "rope": False, "rms_norm": False, "swiglu": False}
    with pytest.raises(ValueError, match=r"ended without the distillation loss.*liger_kernel\."):
        trainer(student, tmp_path, use_liger_kernel=True, liger_kernel_config=own).train()


def sft(student: nn.Module, folder: Path, kind: type[Trainer]) -> Trainer:
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    words = ["<s>", "<pad>", "</s>"] + [f"w{i}" for i in range(VOCAB - 3)]
    table = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    texts = [" ".join(f"w{(7 * i + j * j) % (VOCAB - 3)}" for j in range(9)) for i in range(8)]
    args = SFTConfig(
        output_dir=str(folder),
        bf16=False,
        logging_steps=1,
        **SHORT,
    )
    data = datasets.Dataset.from_list([{"text": text} for text in texts])
    return kind(model=student, args=args, train_dataset=data, processing_class=fast)


# TRL 1.16 sets it by the name that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("attach_first", [True, False], ids=["attach, then trainer", "trainer, then attach"])
def test_sft_trainer_is_refused_and_its_cure_distils(tmp_path: Path, attach_first: bool) -> None:
    trl = pytest.importorskip("trl")

    class DistillSFTTrainer(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss  # the cure that the messages name

    for kind in (trl.SFTTrainer, DistillSFTTrainer):
        student, teacher = (make_model("llama", seed=seed, dtype=torch.float32) for seed in (1, 2))
        if attach_first:
            plugin = kd.attach(student, teacher, CONFIG)
            training = sft(student, tmp_path, kind)
        else:
            training = sft(student, tmp_path, kind)
            plugin = kd.attach(student, teacher, CONFIG)
        if kind is trl.SFTTrainer:
            with pytest.raises(ValueError, match=r"compute_loss = transformers.Trainer.compute_loss"):
                training.train()
        else:
            training.train()
            assert plugin.metrics()["valid_tokens"] > 0


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """bf16; what accelerate keeps for the whole process is forgotten before and after."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


class TestAccelerate:
    """accelerate binds forwards anew, in `prepare` and in `unwrap_model`."""

    @pytest.mark.parametrize("detach_first", [True, False])
    def test_unwrap_and_detach_in_any_order(self, accelerator: Any, detach_first: bool) -> None:
        student, _, plugin = pair()
        batch = make_batch()
        plain = type(student).forward(student, input_ids=batch["input_ids"]).logits
        prepared = accelerator.prepare(student)
        wanted = prepared(**batch).loss.item()
        steps = [plugin.detach, lambda: accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)]
        for step in steps if detach_first else reversed(steps):
            step()
            if step != plugin.detach and not detach_first:
                assert prepared(**batch).loss.item() == pytest.approx(wanted, rel=2e-2)
                assert prepared(batch["input_ids"], labels=batch["labels"]).loss.item() == prepared(**batch).loss.item()
        assert torch.equal(prepared(batch["input_ids"]).logits, plain)
        assert torch.equal(prepared(input_ids=batch["input_ids"]).logits, plain)
        kd.attach(prepared, make_model("llama", seed=2, dtype=torch.float32), CONFIG)
        assert prepared(**batch).loss.item() == pytest.approx(wanted, rel=2e-2)

    def test_a_teacher_under_accelerates_wrapper_still_serves_one_student(self, accelerator: Any) -> None:
        _, teacher, _ = pair()
        accelerator.prepare(teacher)
        with pytest.raises(ValueError, match="serves another student"):
            kd.attach(make_model("llama", seed=3), teacher, CONFIG)
