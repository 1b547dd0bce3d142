"""Models whose heads and loss outweigh the rest, on both sides of the comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from kd_plugin.settings.run import RunConfig

VOCAB, STUDENT_WIDTH, TEACHER_WIDTH = 4096, 96, 160
BATCH, LENGTH, CHUNK = 2, 129, 64


def settings(width: int) -> dict[str, object]:
    """Of a Llama with one thin layer and an untied head."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
    }


def make_models() -> tuple[nn.Module, nn.Module]:
    """Student and teacher, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return tuple(LlamaForCausalLM(LlamaConfig(**settings(width))) for width in (STUDENT_WIDTH, TEACHER_WIDTH))


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
            "data": {"seq_len": LENGTH},
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
    from transformers import LlamaConfig

    for name, width in (("student", STUDENT_WIDTH), ("teacher", TEACHER_WIDTH)):
        LlamaConfig(**settings(width)).save_pretrained(folder / name)
