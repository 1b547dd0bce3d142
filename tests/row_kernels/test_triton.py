"""The Triton kernel: its cases under the interpreter, its source, and when it is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kd_plugin as kd
from kd_plugin.divergences.objective import make_objective
from kd_plugin.row_kernels import dispatch, triton_kernel
from kd_plugin.row_kernels.codegen import Source, generate
from kd_plugin.row_kernels.expressions import INPUTS
from kd_plugin.row_kernels.row_pass import LogitTransform, RowSpec
from kd_plugin.settings.run import DistillConfig
from tests.oracle import make_problem

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_cases_under_the_interpreter(repo_root: Path) -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    # An overflow in a branch that `where` does not take is a warning of NumPy's
    options = ["-q", "-x", "--timeout=100", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/triton_cases.py"],
        cwd=repo_root,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", result.stdout)
    assert int(passed) > 80
    assert "skipped" not in result.stdout


def source_of(
    vocab: int = 1000,
    with_gradient: bool = True,
    teacher_vocab: int | None = None,
    each_weighted: bool = False,
    **settings: object,
) -> Source:
    config = DistillConfig(**settings)
    given = [name for name in INPUTS if not (name == "target" and config.hard_weight == 0)]
    given = [name for name in given if not (name == "teacher" and config.soft_weight == 0)]
    given = [name for name in given if each_weighted or name != "hard_weight"]
    spec = RowSpec(make_objective(config), with_gradient=with_gradient)
    return generate(spec, vocab, tuple(given), teacher_vocab)


@pytest.mark.parametrize(
    ("sweeps", "settings"),
    [
        (2, {"divergence": "forward_kl", "temperature": 2.0}),
        (2, {"divergence": "soft_ce"}),
        (2, {"soft_weight": 0, "label_smoothing": 0.1, "z_loss_weight": 0.1}),
        (2, {"divergence": "jsd", "with_gradient": False}),
        (3, {"divergence": "reverse_kl"}),
        (3, {"divergence": "jsd", "temperature": 2.0}),
        (3, {"terms": [{"name": "forward_kl"}, {"name": "tvd"}]}),
        (1, {"divergence": "logit_mse", "metrics": False, "hard_weight": 0}),
    ],
)
def test_as_few_sweeps_as_the_definition_needs(sweeps: int, settings: dict[str, Any]) -> None:
    source = source_of(**settings)
    assert source.sweeps == sweeps
    assert source.text.count("for start in") == sweeps
    assert source.text.count("tl.store(student_row") == settings.get("with_gradient", True)


def test_columns_that_the_teacher_lacks_take_loops_but_no_sweep_of_their_own() -> None:
    source = source_of(divergence="forward_kl", temperature=2.0, teacher_vocab=900)
    assert source.sweeps == 2
    ranges = re.findall(r"for start in range\((\d+, \d+), BLOCK\)", source.text)
    assert ranges == ["0, 900", "900, 1000"] * 2
    assert "900" not in source_of(soft_weight=0, teacher_vocab=900).text


def test_equal_expressions_are_written_once_per_sweep() -> None:
    text = source_of(divergence="skew_reverse_kl", temperature=2.0).text
    for sweep in text.split("for start in"):
        values = Counter(re.findall(r"^ +[rt]\d+ = (.*)$", sweep, re.MULTILINE))
        assert not {value: times for value, times in values.items() if times > 1}


def test_only_what_is_needed_is_read() -> None:
    assert source_of(soft_weight=0).inputs == ("student", "target", "weight")
    assert source_of(hard_weight=0).inputs == ("student", "teacher", "weight")
    assert "weight" not in source_of(with_gradient=False).inputs


def test_a_weight_for_each_loss_takes_no_sweep_more() -> None:
    for settings in ({"divergence": "forward_kl"}, {"divergence": "jsd", "teacher_vocab": 700}):
        each = source_of(each_weighted=True, **settings)
        assert each.inputs == ("student", "teacher", "target", "weight", "hard_weight")
        assert each.sweeps == source_of(**settings).sweeps


@pytest.fixture
def compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


ALL = ("skew_kl", "skew_reverse_kl", "tvd", "acceptance", "logit_mse", "logit_mse_centered", "cosine", "soft_ce")


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "forward_kl"},
        {"divergence": "jsd", "temperature": 2.0, "label_smoothing": 0.1},
        {"terms": [{"name": name} for name in ALL]},
        {"teacher_vocab": 900},
        {"teacher_vocab": 900, "hard_weight": 0.0},
    ],
    ids=["forward_kl", "jsd", "composed", "fewer columns of the teacher", "no loss of the others"],
)
@pytest.mark.usefixtures("compiler_cache")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled under the interpreter")
def test_compiles_for_a_gpu_that_need_not_be_there(settings: dict[str, Any]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    settings = dict(settings)
    teacher_vocab = settings.pop("teacher_vocab", None)
    spec = RowSpec(make_objective(DistillConfig(**settings)), LogitTransform(scale=0.5, softcap=30.0))
    given = tuple(name for name in INPUTS if not (name == "target" and settings.get("hard_weight") == 0))
    kernel = triton_kernel.build(spec, 1025, given, teacher_vocab)
    types = {"ptr": "*fp32", "stride": "i32", "BLOCK": "constexpr"}
    signature = {name: types[name.rpartition("_")[2]] for name in kernel.function.arg_names}
    for capability in (80, 90):
        compiled = compile(
            ASTSource(kernel.function, signature, constexprs={"BLOCK": 1024}),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 4, **triton_kernel._OPTIONS},
        )
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000


def test_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"^row_kernel triton needs CUDA tensors, found cpu: set row_kernel to auto"):
        kd.distill_loss(*make_problem(dtype=torch.float32), config=DistillConfig(row_kernel="triton"))


def test_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton, or set row_kernel to auto"):
        dispatch.choose("triton", "cuda")


def run_rows(dtype: torch.dtype = torch.float32, teacher_vocab: int = 5, **settings: object) -> None:
    spec = RowSpec(make_objective(DistillConfig(hard_weight=0, **settings)))
    student, teacher = (torch.zeros(2, vocab, dtype=dtype) for vocab in (5, teacher_vocab))
    dispatch.run("triton", spec, 2, student, teacher, None, None)


def test_refuses_fp64() -> None:
    with pytest.raises(ValueError, match=r"computes in float32, found torch\.float64 logits: set row_kernel to auto"):
        run_rows(torch.float64)


def test_refuses_what_needs_a_sort() -> None:
    with pytest.raises(ValueError, match="has no sort, which divergence uld needs: set row_kernel to auto"):
        run_rows(divergence="uld", teacher_vocab=7)


def test_refuses_functions_that_it_has_no_expression_for() -> None:
    kd.register_divergence("with_erf", lambda lq, lp: torch.erf(lq - lp) ** 2)
    with pytest.raises(ValueError, match=r"has no aten\.erf\.default, which with_erf uses: set row_kernel to auto"):
        run_rows(divergence="with_erf")


def test_triton_is_imported_late(repo_root: Path) -> None:
    code = (
        "import sys, kd_plugin.loss.from_hidden, kd_plugin.row_kernels.triton_kernel; sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root, timeout=100).returncode == 0


def test_the_shape_of_a_launch_hangs_on_no_clock_and_no_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of a row change with it in their last bits."""
    launched: list[dict[str, int]] = []

    class Function:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *arguments, **settings: launched.append(settings)

    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
    monkeypatch.setattr(triton_kernel, "_triton", lambda: SimpleNamespace(knobs=knobs))
    for sweeps in (2, 3):
        kernel = triton_kernel.Kernel(Source("", ("student", "teacher"), sweeps), Function())
        monkeypatch.setattr(triton_kernel, "build", lambda *arguments, kernel=kernel: kernel)
        for rows in (1, 300):
            spec = RowSpec(make_objective(DistillConfig()))
            dispatch.run("triton", spec, rows, torch.ones(rows, 50257), torch.ones(rows, 50257), None, None)
    two, again, three, and_again = launched
    assert two == again and three == and_again
    assert (two["BLOCK"], two["num_warps"]) == (2048, 8) and (three["BLOCK"], three["num_warps"]) == (2048, 16)
    assert triton_kernel.launch_shape(1, 2)["BLOCK"] == triton_kernel.launch_shape(1024, 2)["BLOCK"] == 1024
