"""Tiny runs of `kd.train`: a teacher with its tokenizer and a text on disk, configurations, what a run logged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.engines.fsdp import FsdpEngine
from kd_plugin.engines.process_group import start_process_group
from kd_plugin.models.loading import build_student, load_teacher
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.run import TrainResult
from tests.tiny_models import make_model

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps under an old tree".split()


def make_teacher(folder: Path, *, layers: int = 4, tied: bool = False, dropout: float = 0.0) -> Path:
    """A random Llama (V 64, hidden 32) with a character tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    sizes = {"vocab_size": 64, "num_hidden_layers": layers, "max_position_embeddings": 128}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    model = make_model(
        "llama", seed=7, dtype=torch.float32, dropout=dropout, tie_word_embeddings=tied, **sizes, **special
    )
    model.save_pretrained(folder)
    return folder


def make_text(path: Path) -> Path:
    """Forty short documents, one per line group."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (40, 30), generator=generator)
    path.write_text("\n\n".join(" ".join(WORDS[i] for i in row) + "." for row in picks.tolist()))
    return path


def run_config(folder: Path, name: str = "run", **sections: Any) -> RunConfig:
    """Five fp32 steps over 8 sequences each on the teacher in `folder`; `sections` are merged over it."""
    values: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "student": {"from_teacher": {"layers": 2}, "dtype": "float32"},
        "distill": {"row_kernel": "eager", "chunk_size": 48, "temperature": 2.0},
        "data": {"train": str(folder / "text.txt"), "seq_len": 32, "eval_fraction": 0.2},
        "train": {
            "max_steps": 5,
            "tokens_per_step": 8 * 32,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "warmup_steps": 2,
            "eval_sequences": 4,
            "process_group_timeout_s": 60,
        },
        "log": {"output_dir": str(folder / name), "tensorboard": False},
    }
    for section, update in sections.items():
        values[section] = {**values.get(section, {}), **update} if update is not None else None
    return RunConfig.model_validate(values)


def make_folder(folder: Path, **teacher: Any) -> Path:
    """Teacher and text in one folder."""
    make_teacher(folder / "teacher", **teacher)
    make_text(folder / "text.txt")
    return folder


def curve(result: dict[str, Any] | TrainResult, name: str = "loss") -> list[float]:
    """One number of every logged step of a run."""
    history = result.history if isinstance(result, TrainResult) else result["history"]
    return [values[name] for values in history]


def assert_same_steps(found: dict[str, Any] | TrainResult, wanted: TrainResult) -> None:
    """Losses and gradient norms, as two ranks have those of one."""
    assert curve(found) == pytest.approx(curve(wanted), rel=2e-5)
    assert curve(found, "grad_norm") == pytest.approx(curve(wanted, "grad_norm"), rel=1e-4)


@contextmanager
def engine_after_a_step(config: RunConfig) -> Iterator[FsdpEngine]:
    """The engine of one process, which has taken an optimizer step on 2 x 32 tokens."""
    place = start_process_group(60)
    try:
        teacher = load_teacher(config.teacher)
        student = build_student(config.student, teacher, seed=0)
        kd.attach(student, teacher, config.distill)
        engine = FsdpEngine(student, teacher, config, place, "single")
        ids = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(0))
        engine.forward_backward({"input_ids": ids, "labels": ids}, num_items=62, is_last=True)
        engine.step(1e-3)
        yield engine
    finally:
        place.close()
