"""A student whose head has more rows than its teacher's: what each number is over, on every path of one process.

The expected values are written out here with PyTorch's own dense functions in fp64, or are the oracle's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kd_plugin as kd
from kd_plugin.distributed.vocab_slice import cut
from kd_plugin.exchange import vocab_parallel
from kd_plugin.loss import chunk_loop, from_hidden
from kd_plugin.loss.chunk_size import chunk_rows
from kd_plugin.loss.head_call import HeadCall
from kd_plugin.loss.teacher import HeadTeacher
from kd_plugin.plugin.metrics import GIB
from kd_plugin.row_kernels.dispatch import LogitTransform
from tests.loss_cases import check, config_of, run, sums_of
from tests.oracle import ALL_DIVERGENCES, Problem, gradients, make_problem, relative_error
from tests.tiny_models import assert_same_gradients, gradients_of, make_model

V, SHARED = 29, 23  # rows of the student's head, and of the teacher's
BY_ID = tuple(name for name in ALL_DIVERGENCES if name != "uld")
EVERYTHING = {"temperature": 2.0, "label_smoothing": 0.1, "z_loss_weight": 0.02}


def problem_of(rows: int = 19, **options: object) -> Problem:
    """Some labels are ids that the teacher lacks."""
    problem = make_problem(rows=rows, vocab=V, teacher_vocab=SHARED, bias=True, **options)
    problem.targets[3], problem.targets[7] = SHARED, V - 1
    return problem


class Dense(NamedTuple):
    """Whole logits of the rows that count, fp64; the student's with a graph."""

    student: Tensor  # [n, V]
    teacher: Tensor  # [n, SHARED]
    targets: Tensor  # [n]


def dense(problem: Problem) -> Dense:
    valid = problem.targets != -100
    student = problem.hidden @ problem.weight.T + problem.bias
    teacher = problem.teacher_hidden @ problem.teacher_weight.T + problem.teacher_bias
    return Dense(student[valid], teacher[valid], problem.targets[valid])


def test_the_definition() -> None:
    problem = problem_of()
    student, teacher, targets = dense(problem)
    out = run(problem, config_of(temperature=2.0))
    hard = F.cross_entropy(student, targets)
    soft = 4 * F.kl_div(F.log_softmax(student[:, :SHARED] / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean")
    assert out.hard_loss.item() == pytest.approx(hard.item(), rel=1e-13)
    assert out.soft_loss.item() == pytest.approx(soft.item(), rel=1e-13)
    q, p = student.softmax(-1), F.pad(teacher.softmax(-1), (0, V - SHARED))
    some = p > 0
    expected = {
        "kl_t1": torch.where(some, p * (p.log() - q.log()), 0.0).sum(-1),
        "acceptance_rate": torch.minimum(p, q).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -torch.where(some, p * p.log(), 0.0).sum(-1),
    }
    assert out.metrics.keys() == expected.keys()
    for name, values in expected.items():
        assert out.metrics[name].item() == pytest.approx(values.mean().item(), rel=1e-12), name


def test_the_rows_that_the_teacher_lacks_learn_from_the_hard_loss_alone() -> None:
    problem = problem_of()
    student, _, targets = dense(problem)
    leaves = [problem.weight, problem.bias]
    wanted = gradients(0.4 * F.cross_entropy(student, targets), leaves)
    for found, expected in zip(gradients(run(problem, config_of()).loss, leaves), wanted, strict=True):
        assert relative_error(found[SHARED:], expected[SHARED:]) < 1e-12
        assert relative_error(found[:SHARED], expected[:SHARED]) > 0.1  # these have the soft loss, too
    for grad in gradients(run(problem, config_of(hard_weight=0)).loss, leaves):
        assert not grad[SHARED:].any() and grad[:SHARED].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ALL_DIVERGENCES)
def test_every_divergence_in_chunks(divergence: str, temperature: float) -> None:
    problem = problem_of()
    settings = {**EVERYTHING, "temperature": temperature}
    for chunk_size in (1, 4, 64):
        check(problem, config_of(divergence, chunk_size=chunk_size, **settings), tolerance=1e-12, scale=0.37)


PARTS = {
    "soft only": {"hard_weight": 0.0},
    "soft only, no metrics": {"hard_weight": 0.0, "metrics": False},
    "no metrics": {"metrics": False},
    "hard only": {"soft_weight": 0.0},
    "terms": {"terms": [{"name": "forward_kl", "temperature": 3.0}, {"name": "reverse_kl"}, {"name": "cosine"}]},
    "uld": {"divergence": "uld", "label_smoothing": 0.1},
}


KERNELS = [(name, "eager") for name in PARTS] + [("soft only", "compile"), ("no metrics", "compile")]


@pytest.mark.parametrize(("part", "kernel"), KERNELS)
def test_parts_of_the_objective(part: str, kernel: str) -> None:
    config = kd.DistillConfig(
        **{"soft_weight": 0.7, "hard_weight": 0.4, "row_kernel": kernel, "chunk_size": 4, **PARTS[part]}
    )
    weights = torch.linspace(0, 3, 19)
    check(problem_of(), config, tolerance=1e-11, token_weights=weights)
    reference = kd.reference.distill_loss(*problem_of(), config=config, token_weights=weights, **problem_of().biases)
    out = run(problem_of(), config, token_weights=weights)
    for name, value in (*out._asdict().items(), *out.metrics.items()):
        if isinstance(value, Tensor):
            wanted = reference.metrics[name] if name in reference.metrics else getattr(reference, name)
            assert value.item() == pytest.approx(wanted.item(), rel=1e-11, abs=1e-12), name


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_compiled_kernel() -> None:
    """All divergences in one graph."""
    terms = [{"name": name, "weight": 0.3 + 0.1 * i, "temperature": 1 + i % 2} for i, name in enumerate(BY_ID)]
    config = kd.DistillConfig(terms=terms, label_smoothing=0.1, z_loss_weight=0.02, row_kernel="compile", chunk_size=4)
    for problem in (problem_of(), problem_of(seed=1)):
        check(problem, config, tolerance=1e-11, scale=0.37)


def test_scale_and_softcap_of_either_model() -> None:
    problem, transforms = problem_of(), (LogitTransform(0.5, 4.0), LogitTransform(2.0, 6.0))
    config = config_of("jsd", **EVERYTHING)
    sums = sums_of(problem, config, transforms=transforms)
    raw = dense(problem)
    capped = [cap * torch.tanh(scale * z / cap) for z, (scale, cap) in zip(raw[:2], transforms, strict=True)]
    wanted = kd.reference.distill_logits(*capped, raw.targets, config=config).loss
    loss = sums.loss_sum / sums.num_valid
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for pair in zip(gradients(loss, problem.leaves), gradients(wanted, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-11


def test_fp32() -> None:
    problem = make_problem(37, 19, 23, 101, 83, dtype=torch.float32, bias=True)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        check(problem, config_of(divergence, chunk_size=7, **EVERYTHING), tolerance=1e-5, scale=0.37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_less_than_eager_in_the_same_precision(dtype: torch.dtype) -> None:
    problem = make_problem(61, 33, 33, 203, 150, dtype=dtype)
    config = config_of("forward_kl", chunk_size=16, temperature=2.0)
    expected = problem.expected(config)
    out = run(problem, config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    logits = [F.linear(*pair).float() for pair in (tuple(problem)[:2], tuple(problem)[2:4])]
    naive = kd.reference.distill_logits(*logits, problem.targets, config=config).loss
    wanted = gradients(expected.loss, problem.leaves)
    for ours, theirs, truth in zip(
        gradients(out.loss, problem.leaves), gradients(naive, problem.leaves), wanted, strict=True
    ):
        assert relative_error(ours, truth) <= relative_error(theirs, truth)


@pytest.mark.parametrize("shift", [-60.0, -9.0, 0.0, 9.0, 60.0])
def test_whichever_rows_hold_the_mass(shift: float) -> None:
    """Almost none of it, or almost all, on ids that the teacher lacks; the student is its teacher elsewhere."""
    generator = torch.Generator().manual_seed(2)
    teacher = 3 * torch.randn(5, SHARED, generator=generator, dtype=torch.float64)
    rest = torch.randn(5, V - SHARED, generator=generator, dtype=torch.float64) + shift
    student = torch.cat([teacher, rest], 1).requires_grad_()
    targets = torch.tensor([0, V - 1, SHARED, 3, SHARED - 1])
    config = config_of("forward_kl", temperature=2.0)
    rest_mass = (rest.logsumexp(-1) - student.logsumexp(-1)).exp()
    kl = -(1 - rest_mass).log() if shift < 9 else student.logsumexp(-1) - teacher.logsumexp(-1)
    (wanted,) = torch.autograd.grad(0.4 * F.cross_entropy(student, targets), student)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
        leaf = student.detach().to(dtype).requires_grad_()
        out = kd.distill_logits(leaf, teacher.to(dtype), targets, config=config)
        assert out.soft_loss.item() == pytest.approx(0, abs=tolerance)
        hard = F.cross_entropy(student, targets).item()
        assert out.hard_loss.item() == pytest.approx(hard, rel=tolerance, abs=tolerance)
        assert out.metrics["kl_t1"].item() == pytest.approx(kl.mean().item(), rel=tolerance, abs=tolerance / 10)
        agree = (student.argmax(-1) < SHARED).double().mean().item()
        assert out.metrics["top1_agreement"].item() == agree
        (found,) = torch.autograd.grad(out.loss, leaf)
        assert relative_error(found, wanted) < 5 * tolerance


def test_masked_rows_of_the_student_alone_count_for_nothing() -> None:
    """As where a model adds -inf to the logits of its padding."""
    student, teacher = (2 * torch.randn(6, n, dtype=torch.float64) for n in (V, SHARED))
    student[:, SHARED:] = -math.inf
    targets = torch.arange(6)
    outs, grads = [], []
    for columns in (V, SHARED):
        leaf = student[:, :columns].clone().requires_grad_()
        outs.append(kd.distill_logits(leaf, teacher, targets, config=config_of("reverse_kl")))
        grads.append(torch.autograd.grad(outs[-1].loss, leaf)[0])
    assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-13)
    for name, value in outs[0].metrics.items():
        assert value.item() == pytest.approx(outs[1].metrics[name].item(), rel=1e-12, abs=1e-15), name
    torch.testing.assert_close(grads[0][:, :SHARED], grads[1], rtol=1e-12, atol=1e-15)
    assert not grads[0][:, SHARED:].any()


LOGITS = {
    "fused": kd.distill_logits,
    "reference": kd.reference.distill_logits,
    "both models trained": lambda *tensors, **options: kd.distill_logits(*tensors, detach_teacher=False, **options),
}


@pytest.mark.parametrize("way", LOGITS)
@pytest.mark.parametrize("divergence", ["forward_kl", "acceptance", "uld"])
def test_logits(divergence: str, way: str) -> None:
    problem = problem_of()
    with torch.no_grad():
        student, teacher, _ = dense(replace(problem, targets=torch.zeros(19, dtype=torch.int64)))
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    config = config_of(divergence, chunk_size=4, **EVERYTHING)
    out, expected = LOGITS[way](student, teacher, problem.targets, config=config), problem.expected(config)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    for name, value in expected.metrics.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-12), name
    (found,) = torch.autograd.grad(out.loss, student, retain_graph=True)
    for grad, wanted in zip(
        (found.T @ problem.hidden.detach(), found @ problem.weight.detach()),
        gradients(expected.loss, [problem.weight, problem.hidden]),
        strict=True,
    ):
        assert relative_error(grad, wanted) < 1e-11
    if way == "both models trained":
        (of_teacher,) = torch.autograd.grad(out.loss, teacher)
        assert of_teacher.isfinite().all() and of_teacher.any()


def test_losses_per_token() -> None:
    problem = problem_of()
    config, factors = config_of("jsd", **EVERYTHING), torch.linspace(-2, 3, 19).double()
    losses = kd.distill_loss_per_token(*problem, config=config, **problem.biases)
    expected = problem.expected(config, token_weights=factors, num_items=1)
    assert (losses.loss * factors).sum().item() == pytest.approx(expected.loss.item(), rel=1e-12)
    found = gradients((losses.loss * factors).sum(), problem.leaves)
    for pair in zip(found, gradients(expected.loss, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-12


def test_a_registered_divergence_sees_the_shared_ids() -> None:
    kd.register_divergence("squares", lambda log_q, log_p: (log_q.exp() - log_p.exp()) ** 2 + 0 * log_q)
    problem = problem_of()
    student, teacher, _ = dense(problem)
    q, p = student[:, :SHARED].softmax(-1), teacher.softmax(-1)
    wanted = (q - p).square().sum(-1).mean()
    out = run(problem, config_of("squares", hard_weight=0.0, soft_weight=1.0))
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    for pair in zip(gradients(out.loss, problem.leaves), gradients(wanted, problem.leaves), strict=True):
        assert relative_error(*pair) < 1e-11


# -- memory -------------------------------------------------------------------------------------------------


def test_the_bytes_of_each_heads_own_columns_are_counted() -> None:
    problem = make_problem(50, 8, 8, 1021, 300, dtype=torch.float32, ignored=())
    config = config_of(chunk_size="auto", loss_memory_mb=0.05)
    rows = int(0.05 * 2**20) // (4 * (1021 + 300))
    assert rows == chunk_rows(config, 1021, 300) == 9 > chunk_rows(config, 1021, None)
    sums = sums_of(problem, config)
    assert sums.workspace_bytes == 4 * (rows * (1021 + 300) + 50 * 8 + 1021 * 8)
    assert sums.dense_bytes == 4 * 50 * (1021 + 300)
    alone = sums_of(problem, config_of(soft_weight=0.0))
    assert alone.dense_bytes == 4 * 50 * 1021


def test_fp64_models_avoid_the_same_logits() -> None:
    problem = make_problem(50, 8, 8, 101, 30, ignored=())
    sums = sums_of(problem, config_of())
    assert sums.dense_bytes == 4 * 50 * (101 + 30)


# -- attached -----------------------------------------------------------------------------------------------


def attached_batch(length: int = 11) -> tuple[Tensor, Tensor]:
    """Inputs that both models embed; labels that the student alone knows among them."""
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, 4], labels[1, 7], labels[1, 2] = 70, 66, -100
    return ids, labels


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "phi", "cohere"])
def test_the_hard_loss_is_the_students_own(name: str) -> None:
    student, teacher = make_model(name, seed=1, vocab_size=71), make_model(name, seed=2, vocab_size=61)
    ids, labels = attached_batch()
    own = student(input_ids=ids, labels=labels).loss
    wanted = gradients_of(student, lambda: student(input_ids=ids, labels=labels).loss)
    plugin = kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    loss = student(input_ids=ids, labels=labels).loss
    metrics = plugin.metrics()
    assert metrics["hard_loss"] == pytest.approx(own.item(), rel=1e-6)  # its cross-entropy is fp32
    assert loss.item() == pytest.approx(0.5 * metrics["soft_loss"] + 0.5 * metrics["hard_loss"], rel=1e-12)
    assert metrics["logits_avoided_gib"] * GIB == 4 * 19 * (71 + 61)
    student.zero_grad()
    loss.backward()
    head = student.get_output_embeddings()
    head_name = next(n for n, p in student.named_parameters() if p is head.weight)
    torch.testing.assert_close(head.weight.grad[61:], 0.5 * wanted[head_name][61:], rtol=1e-5, atol=1e-8)
    plugin.detach()


def test_a_lora_adapter_on_the_head() -> None:
    peft = pytest.importorskip("peft")
    ids, labels = attached_batch()

    def gradients_by(attach: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student = make_model("llama", seed=1, vocab_size=71)
        teacher = make_model("llama", seed=2, vocab_size=61)
        adapter = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        student = peft.get_peft_model(student, adapter).double()
        config = kd.DistillConfig(divergence="jsd", row_kernel="eager", chunk_size=4, **EVERYTHING)
        if attach:
            kd.attach(student, teacher, config)
            return gradients_of(student, lambda: student(input_ids=ids, labels=labels).loss)
        targets = labels[:, 1:].reshape(-1)
        with torch.no_grad():
            of_teacher = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1)

        def loss() -> Tensor:
            logits = student(input_ids=ids).logits[:, :-1].flatten(0, 1)
            return kd.reference.distill_logits(logits, of_teacher, targets, config=config).loss

        return gradients_of(student, loss)

    assert_same_gradients(gradients_by(attach=True), gradients_by(attach=False), tolerance=1e-9)


def untrained(caplog: pytest.LogCaptureFixture, **changes: object) -> list[str]:
    """What `attach` and three steps warn of."""
    student, teacher = make_model("llama", seed=1, vocab_size=71), make_model("llama", seed=2, vocab_size=61)
    student.get_output_embeddings().requires_grad_(not changes.pop("frozen", False))
    if changes.pop("swapped", False):
        student, teacher = teacher, student
    settings = {"hard_weight": 0.0, "row_kernel": "eager", **changes}
    ids, _ = attached_batch()
    with caplog.at_level(logging.WARNING):
        plugin = kd.attach(student, teacher, kd.DistillConfig(**settings))
        for _ in range(3):
            student(input_ids=ids, labels=ids)
        plugin.detach()
    found, caplog.records[:] = [record.getMessage() for record in caplog.records], []
    return found


def test_rows_that_nothing_trains_are_said_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = untrained(caplog)
    for words in ("distill.hard_weight is 0", "71 rows", "teacher's 61", "rows 61 to 70", "set hard_weight > 0"):
        assert words in message
    for changes in ({"hard_weight": 0.1}, {"frozen": True}, {"swapped": True}, {"divergence": "uld"}):
        assert untrained(caplog, **changes) == []


@pytest.mark.parametrize("label", [61, 70])
def test_loss_rows_may_point_at_labels_that_the_teacher_lacks_and_at_no_others(label: int) -> None:
    student, teacher = make_model("llama", seed=1, vocab_size=71), make_model("llama", seed=2, vocab_size=61)
    ids, _ = attached_batch()
    labels = torch.full_like(ids, -100)
    labels[0, 5] = label
    kd.attach(student, teacher, kd.DistillConfig(row_kernel="eager"))
    given = student(input_ids=ids, labels=labels, loss_rows=torch.tensor([4])).loss
    assert given.item() == student(input_ids=ids, labels=labels).loss.item()
    labels[0, 5] = 71
    with pytest.raises(ValueError, match=r"labels\[0, 5\] is 71, but the student's vocabulary is 0 to 70"):
        student(input_ids=ids, labels=labels)
    with pytest.raises(ValueError, match="outside the vocabulary of 71"):
        student(input_ids=ids, labels=labels, loss_rows=torch.tensor([4]))


@pytest.fixture
def process_group() -> Iterator[None]:
    """One rank, which holds all columns."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_shards(problem: Problem, config: kd.DistillConfig, rows: Tensor | None = None) -> tuple[Tensor, int]:
    """Loss sum in exchange `stats`, and the bytes of its whole logits."""
    teacher = HeadTeacher(problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)
    teacher = teacher if config.soft_weight else None
    call = HeadCall(teacher, problem.targets, rows)
    given = from_hidden.make_problem(call, config, problem.hidden, V, teacher_size=SHARED)
    vocab_slice = cut(V, None if teacher is None else SHARED, None)
    tensors = (problem.hidden, problem.weight, problem.bias)
    loss_sum, _ = vocab_parallel.VocabParallelDistill.apply(*tensors, given, vocab_slice, 1.0)
    return loss_sum, given.dense_bytes


@pytest.mark.usefixtures("process_group")
def test_a_vocabulary_in_shards_counts_its_logits_as_a_whole_one_does() -> None:
    for dtype in (torch.float32, torch.float64):
        problem = problem_of(dtype=dtype, ignored=())
        assert in_shards(problem, config_of())[1] == 4 * 19 * (V + SHARED)
        assert in_shards(problem, config_of(soft_weight=0.0))[1] == 4 * 19 * V


@pytest.mark.usefixtures("process_group")
def test_an_fp32_bias_beside_a_bf16_head_gets_an_fp32_gradient() -> None:
    problem = problem_of(dtype=torch.bfloat16)
    problem.bias = problem.bias.detach().float().requires_grad_()
    config = config_of()
    loss, _ = in_shards(problem, config)
    (found,) = torch.autograd.grad(loss, problem.bias)
    (wanted,) = torch.autograd.grad(problem.expected(config, num_items=1).loss, problem.bias)
    assert found.dtype == torch.float32
    assert relative_error(found, wanted) < 1e-5


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("label", [-100, V])
def test_in_shards_a_label_that_no_rank_has_is_refused(label: int) -> None:
    problem = problem_of(ignored=())
    problem.targets[2] = label
    with pytest.raises(ValueError, match=f"loss_rows point at labels outside the vocabulary of {V} .such as {label}"):
        in_shards(problem, config_of(), rows=torch.arange(5))
    loss, _ = in_shards(problem, config_of(), rows=torch.tensor([0, 1, 3, 7]))
    kept = torch.full((19,), -100).index_copy(0, idx := torch.tensor([0, 1, 3, 7]), problem.targets[idx])
    expected = replace(problem, targets=kept).expected(config_of(), num_items=1)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)


def boom(error: Exception) -> Callable[..., Tensor]:
    def gather(*args: object, **kwargs: object) -> Tensor:
        raise error

    return gather


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: unknown")])
def test_no_other_error_is_told_as_labels_out_of_the_vocabulary(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "gather", boom(error))
    with pytest.raises(type(error), match=str(error)):
        chunk_loop._of_labels(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64))
