"""The points at which `gpu_loss.py` measures: shapes, numbers of tokens, contestants and their variants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from cases import Case
from contestants import without_cross_entropy
from gpu_part import Part

FLOOR, OURS = "four products", "kd_plugin"
PEERS = ("compiled naive", "Liger", "TRL")
QUICK_PEERS = ("naive", "Liger eager", "TRL")  # nothing is compiled
SHAPES = (  # student's width, teacher's width, vocabulary
    Case(width=2048, teacher_width=4096, vocab=128256),
    Case(width=4096, teacher_width=4096, vocab=151936),
)
QUICK_SHAPES = (Case(width=32, teacher_width=48, vocab=512), Case(width=32, vocab=640))
TOKENS, QUICK_TOKENS = (1024, 2048, 4096, 8192), (32, 64)
CHUNKS, QUICK_CHUNKS = (512, 1024, 2048, 4096), (8, 16)
CLOSE_TEACHER = {"teacher_noise": 0.01, "hard_weight": 0.0, "soft_weight": 1.0, "logit_std": 5.0}


class Point(NamedTuple):
    """One line of a table; `label` tells it from all others."""

    label: str
    name: str
    contestant: str
    case: Case
    table: str = "loss"


def shape_of(case: Case) -> str:
    """Student's width, teacher's and vocabulary."""
    return f"{case.width}/{case.teacher_width or case.width}/{case.vocab}"


def groups(options: Part) -> Iterator[list[Point]]:
    """The points of each process, the most wanted first."""
    quick = options.quick
    tokens = QUICK_TOKENS if quick else TOKENS
    common = {"device": options.device, "dtype": "float32" if options.device == "cpu" else "bfloat16"}
    # A processor's eager kernel compiles nothing, which a dry run has no time for.
    common |= {"row_kernel": "eager"} if options.device == "cpu" else {}
    first, second = (
        replace(shape, loss_memory_mb=None, rows=tokens[-1], **common) for shape in (QUICK_SHAPES if quick else SHAPES)
    )
    close = replace(first, rows=tokens[0], **CLOSE_TEACHER)
    names = (FLOOR, OURS, *(QUICK_PEERS if quick else PEERS))
    for name in names:
        points = [_point(name, replace(first, rows=rows)) for rows in tokens]
        if name not in (FLOOR, OURS):
            points.append(_point(name, replace(first, autocast=True), "fp32 under bf16 autocast"))
        if name != FLOOR:
            points.append(_point(name, close, table="close"))
        yield points
    for name in names[:2] if quick else names:
        yield [_point(name, second)]
    yield from _variants(first, QUICK_CHUNKS if quick else CHUNKS)


def _variants(case: Case, chunks: tuple[int, ...]) -> Iterator[list[Point]]:
    kernels = ("eager",) if case.device == "cpu" else ("compile", "triton")
    yield [_point(OURS, replace(case, autocast=True), "fp32 under bf16 autocast")]
    for kernel in kernels:
        yield [_point(OURS, replace(case, row_kernel=kernel), f"row_kernel {kernel}")]
    yield [
        *(_point(OURS, replace(case, chunk_size=chunk), f"chunks of {chunk}") for chunk in chunks),
        _point(OURS, replace(case, metrics=False), "metrics off"),
        _point(OURS, replace(case, logits_dtype="input"), "logits_dtype input"),
    ]
    yield [_point(FLOOR, case, "kd_plugin's chunks")]


def _point(name: str, case: Case, variant: str = "", table: str = "loss") -> Point:
    if name == FLOOR and not variant:
        case = replace(case, chunk_size=case.rows)  # whole, which is the fastest
    if name == "TRL":
        case = without_cross_entropy(case)
    line = f"{name}, {variant}" if variant else name
    contestant = "GEMMs only" if name == FLOOR else name
    return Point(f"{line}, {shape_of(case)}, {case.rows} tokens, {table}", line, contestant, case, table)


def promised_bytes(case: Case) -> int:
    """What kd_plugin says that it takes above its inputs (`loss/chunk_loop.py`).

    The head's gradient in fp32 and the hidden states' stay throughout; the two logits buffers of a chunk are gone when
    backward hands both gradients out in the dtype of the inputs. So is the copy of the head that autocast rounds.
    """
    student_bytes = 4 if case.autocast else getattr(torch, case.dtype).itemsize
    head, hidden = case.vocab * case.width, case.rows * case.width
    in_forward = 8 * case.chunk * case.vocab + (2 * head if case.autocast else 0)
    return 4 * head + student_bytes * hidden + max(in_forward, student_bytes * (head + hidden))
