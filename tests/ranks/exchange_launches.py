"""Which trainings the parity tests of the exchanges launch, and what each group of them is for.

A launch is a dict from what its cases show to the cases. What repeats a claim in a bigger matrix is slow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.ranks.exchange_cases import SEQUENCES, Case

MODES = ("weight", "logits", "stats")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
TORCH = ("ddp", "fsdp1", "alone", "grouped", "root")  # the last three are FSDP2, by the unit of the head
ZERO = ("zero1", "zero2", "zero3")

Cases = dict[str, list[Case]]


def matrix(wrapper: str, **changes: Any) -> list[Case]:
    """Tied and untied, each mode, each divergence."""
    return [
        Case(wrapper, tied, mode, divergence, **changes)
        for tied in (True, False)
        for mode in MODES
        for divergence in DIVERGENCES
    ]


def diagonal(wrapper: str, **changes: Any) -> list[Case]:
    """Each tying with each mode of `matrix`, and over them each divergence."""
    every = matrix(wrapper, **changes)
    return [every[len(DIVERGENCES) * row + row % len(DIVERGENCES)] for row in range(len(every) // len(DIVERGENCES))]


def modes(wrapper: str, *, tied: bool = False, which: tuple[str, ...] = MODES, **changes: Any) -> list[Case]:
    """The same training by each mode."""
    return [Case(wrapper, tied, mode, **changes) for mode in which]


def splits(wrapper: str, ranks: int) -> list[Case]:
    """The same 16 sequences in one micro-batch a rank, and one by one."""
    counts = (1, SEQUENCES // ranks)
    return [case for count in counts for case in modes(wrapper, ranks=ranks, batch="split", accumulation=count)]


def autocast_cases(wrapper: str, *, tied: bool = False) -> Cases:
    """fp32 under bf16 autocast: each mode, and the same wrapper without the plugin."""
    cases = {mode: Case(wrapper, tied, mode, autocast=True) for mode in MODES}
    return {name: [case] for name, case in (cases | {"dense": replace(cases["weight"], loss="dense")}).items()}


def bf16_cases(wrapper: str, *, tied: bool, ranks: int) -> Cases:
    """bf16 on three batches: each mode, and the same wrapper without the plugin."""
    cases = {mode: Case(wrapper, tied, mode, dtype="bfloat16", ranks=ranks) for mode in MODES}
    cases["dense"] = replace(cases["weight"], loss="dense")
    return {name: [replace(case, seed=seed) for seed in range(3)] for name, case in cases.items()}


def flat(cases: Cases) -> list[Case]:
    """All of them."""
    return [case for several in cases.values() for case in several]


def bf16_trainings(*which: tuple[str, bool, int]) -> list[Case]:
    """The bf16 trainings of these (wrapper, tied, ranks)."""
    return [case for wrapper, tied, ranks in which for case in flat(bf16_cases(wrapper, tied=tied, ranks=ranks))]


HEADS = {"bias": False, "softcap": True}  # kind of head -> tied
# bf16 as (wrapper, tied, ranks)
QUICK_BF16 = [("alone", False, 2), ("fsdp1", True, 2), ("zero3", False, 2)]
BF16 = [(wrapper, tied, 2) for wrapper in (*TORCH[1:], *ZERO) for tied in (True, False)]
BF16 += [("hsdp", tied, 4) for tied in (True, False)]

ONE_RANK: Cases = {"a rank alone": [*splits("alone", 1), *splits("zero3", 1)]}

TWO_RANKS: Cases = {
    "every wrapper": [case for wrapper in TORCH for case in diagonal(wrapper)],
    "a teacher of other token ids": [
        *(case for size in (17, 31, 41) for case in modes("alone", teacher_vocab_size=size)),
        *(Case("alone", False, "stats", divergence, teacher_vocab_size=17) for divergence in DIVERGENCES[1:]),
        *(
            case
            for wrapper in ("ddp", "fsdp1", "root")
            for case in modes(wrapper, which=MODES[1:], teacher_vocab_size=17)
        ),
        *(Case("alone", tied, "stats", head=head, teacher_vocab_size=31) for head, tied in HEADS.items()),
    ],
    "a teacher in host memory": [
        Case("alone", tied, mode, teacher="offload") for tied, mode in ((False, "weight"), (True, "stats"))
    ],
    "only one of the models tied": [
        case for tied in (True, False) for case in modes("alone", tied=tied, teacher_tied=not tied)
    ],
    "both models in one wrapper": [
        case for wrapper in ("ddp", "fsdp1", "root") for case in modes(wrapper, teacher="part")
    ],
    "biases and soft-caps": [case for head, tied in HEADS.items() for case in modes("alone", tied=tied, head=head)],
    "the same tokens in other micro-batches": splits("alone", 2),
    "a rank whose epoch ends early": [
        case for wrapper in ("ddp", "fsdp1", "alone") for case in modes(wrapper, batch="early")
    ],
    "bf16": bf16_trainings(*QUICK_BF16[:2]),
    "autocast": flat(autocast_cases("alone")),
    "the soft loss on all tokens": [
        *(case for wrapper in ("ddp", "alone") for case in modes(wrapper, soft_on="all", accumulation=2)),
        Case("alone", False, "stats", "tvd", soft_on="all", teacher_vocab_size=17),
        Case("fsdp1", True, "logits", "jsd", soft_on="all"),
        *(case for batch in ("steps", "early") for case in modes("alone", soft_on="all", counted=True, batch=batch)),
    ],
    "a teacher that reads another text": [
        case for wrapper in ("ddp", "alone") for case in modes(wrapper, own_input=True)
    ],
}

TWO_RANKS_OF_ZERO: Cases = {
    "every stage": [case for wrapper in ZERO for case in diagonal(wrapper)],
    "a teacher of other token ids": [case for size in (17, 31) for case in modes("zero3", teacher_vocab_size=size)],
    "the same tokens in other micro-batches": [
        *splits("zero3", 2),
        *(Case(wrapper, False, "stats", batch="split", accumulation=times) for wrapper in ZERO[:2] for times in (1, 8)),
    ],
    "a rank whose epoch ends early": modes("zero3", batch="early"),
    "the soft loss on all tokens": modes("zero3", soft_on="all"),
    "a teacher that reads another text": modes("zero3", own_input=True),
    "both models in one wrapper": [case for wrapper in ZERO[1:] for case in modes(wrapper, teacher="part")],
    "biases and soft-caps": [
        case for head, tied in HEADS.items() for case in modes("zero3", tied=tied, which=MODES[1:], head=head)
    ],
    "bf16": bf16_trainings(QUICK_BF16[2]),
}

RAGGED_RANKS = modes("alone", ranks=4, batch="ragged", chunk_size=256)
FOUR_RANKS: Cases = {
    "two copies of two shards": [
        *diagonal("hsdp", ranks=4),
        Case("hsdp", False, "stats", "tvd", ranks=4, teacher_vocab_size=31),
        *(Case("hsdp", False, "stats", ranks=4, soft_on="all", counted=counted) for counted in (False, True)),
        Case("hsdp", False, "logits", ranks=4, own_input=True),
    ],
    "four slices of the vocabulary": [
        Case(wrapper, False, "stats", ranks=4) for wrapper in ("alone", "fsdp1", "zero3")
    ],
    "ranks without a token id of a head": [Case("alone", False, "stats", ranks=4, vocab_size=9, teacher_vocab_size=7)],
    "ranks with few rows and many": RAGGED_RANKS,
    "the same tokens in other micro-batches": splits("alone", 4),
}

# Slow: the whole matrices, without what the quick launches have of them.

ALL_OF_TWO_RANKS: Cases = {
    "every wrapper with every divergence": [case for wrapper in TORCH for case in matrix(wrapper)],
    "bf16": bf16_trainings(*(which for which in BF16 if which[0] in TORCH)),
}

ALL_OF_TWO_RANKS_OF_ZERO: Cases = {
    "every stage with every divergence": [case for wrapper in ZERO for case in matrix(wrapper)],
    "bf16": bf16_trainings(*(which for which in BF16 if which[0] in ZERO)),
}

ALL_OF_FOUR_RANKS: Cases = {
    "two copies of two shards": [
        *matrix("hsdp", ranks=4),
        *(Case("hsdp", False, "stats", "tvd", ranks=4, teacher_vocab_size=size) for size in (31, 41)),
        *modes("hsdp", ranks=4, batch="split", accumulation=4),
    ],
    "four slices of the vocabulary": [
        *(case for tied in (True, False) for case in modes("alone", tied=tied, ranks=4)),
        *(Case(wrapper, False, "stats", ranks=4) for wrapper in ("fsdp1", "root")),
        *(case for wrapper in ("ddp", "grouped", *ZERO) for case in modes(wrapper, which=("weight", "stats"), ranks=4)),
    ],
    "as many ids as a rank has": [
        case for wrapper in ("alone", "zero3") for case in modes(wrapper, ranks=4, vocab_size=9, teacher_vocab_size=9)
    ],
    "the same tokens in other micro-batches": [
        case
        for count in (1, 4)
        for case in modes("zero3", which=("weight", "stats"), ranks=4, batch="split", accumulation=count)
    ],
    "bf16": bf16_trainings(*(which for which in BF16 if which[0] == "hsdp")),
}

QUICK = {
    "torch": flat(TWO_RANKS),
    "deepspeed": flat(TWO_RANKS_OF_ZERO),
    "four": flat(FOUR_RANKS),
}
_ALL = {
    "one": flat(ONE_RANK),
    "torch, all": flat(ALL_OF_TWO_RANKS),
    "deepspeed, all": flat(ALL_OF_TWO_RANKS_OF_ZERO),
    "four, all": flat(ALL_OF_FOUR_RANKS),
}
_QUICK_CASES = {case for cases in QUICK.values() for case in cases}
SLOW = {name: [case for case in cases if case not in _QUICK_CASES] for name, cases in _ALL.items()}
