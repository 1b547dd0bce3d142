"""Models whose heads and loss outweigh the rest, on both sides of the comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kd_plugin.settings.run import RunConfig
from tests.tiny_models import make_model

VOCAB, STUDENT_WIDTH, TEACHER_WIDTH = 4096, 96, 160
BATCH, LENGTH, CHUNK = 2, 129, 64


def make_llama(width: int) -> nn.Module:
    """An fp32 Llama with one thin layer and an untied head."""
    thin = {"num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(
        "llama", width=width, vocab_size=VOCAB, dtype=torch.float32, max_position_embeddings=LENGTH, **thin
    )


def make_models() -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    return make_llama(STUDENT_WIDTH), make_llama(TEACHER_WIDTH)


def make_ids(rank: int) -> Tensor:
    """Tokens of one rank, `[B, S]`."""
    return torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank))


def make_config(case: str, folder: Path = Path("nowhere"), row_kernel: str = "compile") -> RunConfig:
    """A run on `folder`/student and `folder`/teacher; `case` is EXCHANGE[:SHARD_SIZE][@train.parallel][+ACCUMULATION].

    With several micro-batches the teacher runs ahead over all of them.
    """
    case, _, accumulation = case.partition("+")
    case, _, parallel = case.partition("@")
    times = int(accumulation or 1)
    exchange, _, shard_size = case.partition(":")
    return RunConfig.model_validate(
        {
            "student": {"model": str(folder / "student"), "dtype": "float32"},
            "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "micro_batch_size": times * BATCH},
            "distill": {"exchange": exchange, "chunk_size": CHUNK, "row_kernel": row_kernel},
            "data": {"seq_len": LENGTH, "packing": "joined"},
            "train": {
                "micro_batch_size": BATCH,
                "gradient_accumulation_steps": times,
                "parallel": parallel or "fsdp",
                "shard_size": shard_size or None,
            },
        }
    )


def write_configurations(folder: Path) -> None:
    """What an estimate reads; there are no weights."""
    for name, model in zip(("student", "teacher"), make_models(), strict=True):
        model.config.save_pretrained(folder / name)
