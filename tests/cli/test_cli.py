"""The command line: what it prints, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import kd_plugin as kd
from kd_plugin.cli import launcher
from kd_plugin.cli.commands import app
from kd_plugin.settings.run import RunConfig
from kd_plugin.training.preflight import SetupError
from launch import train_deepspeed, train_fsdp


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="kd-plugin")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations with which training was started; nothing is trained."""
    runs: list[RunConfig] = []
    monkeypatch.setattr(launcher, "run_training", runs.append)
    monkeypatch.setattr("kd_plugin.cli.commands.run_training", runs.append)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return runs


def test_validate_answers_in_about_a_second_without_torch(config_file: Path) -> None:
    code = (
        "import sys\n"
        "from kd_plugin.cli.commands import app\n"
        "app(['validate', sys.argv[1], 'train.max_steps=3'], standalone_mode=False)\n"
        "print('imported:', sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, config_file], capture_output=True, text=True, check=True, timeout=60
    )
    seconds = time.monotonic() - begin
    assert f"{config_file}: ok" in result.stdout
    assert "train    3 steps" in result.stdout
    assert result.stdout.splitlines()[-1] == "imported: []"
    assert seconds < 5, "0.3 s on an idle core; torch alone would take longer than the rest together"


def test_validate_prints_every_fault_and_exits_with_1(config_file: Path) -> None:
    result = run("validate", config_file, "distill.temperature=0", "oops", "--x=3")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "<command line>: oops: has no '='; write section.key=value",
        "<command line>: --x=3: overrides have no dashes; write section.key=value",
        "<command line>: distill.temperature: wants a number > 0 (got 0)",
    ]


def test_validate_finds_missing_files_and_names_idle_settings(config_file: Path) -> None:
    missing = run("validate", config_file, "data.train=missing.txt", "teacher.model=package:no_such_package")
    assert missing.exit_code == 1 and missing.stdout == ""
    assert missing.stderr.splitlines() == [
        "teacher.model: no installed package 'no_such_package'; install it with pip (where '_' may be '-')",
        "data.train: no such file or directory: missing.txt",
    ]
    idle = run("validate", config_file, "distill.beta=0.3")
    assert idle.exit_code == 0
    assert idle.stdout.splitlines()[-1] == "warning: distill.beta has no effect: it belongs to jsd"


def test_validate_shows_the_terms_that_are_optimised(config_file: Path) -> None:
    terms = "distill.terms=[{name: forward_kl, weight: 0.7}, {name: tvd, weight: 0.3}]"
    shown = run("validate", config_file, terms)
    assert shown.exit_code == 0
    assert "loss     0.5 (0.7 forward_kl + 0.3 tvd) (T=1) + 0.5 cross-entropy" in shown.stdout


def test_validate_shows_what_is_trained_of_the_student(config_file: Path) -> None:
    shown = run("validate", config_file, "student.lora={r: 4, target_modules: [q_proj, v_proj]}")
    assert shown.exit_code == 0
    assert "student  2 layers of the teacher (bfloat16, LoRA r 4 on q_proj v_proj)" in shown.stdout


def test_the_traceback_comes_with_v_only(config_file: Path) -> None:
    result = run("validate", "-v", config_file, "distill.temperature=0")
    assert isinstance(result.exception, kd.ConfigError)


def test_configs_lists_prints_and_copies_the_recipes(tmp_path: Path, repo_root: Path) -> None:
    recipes = sorted((repo_root / "configs").glob("*.yaml"))
    listed = run("configs").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [path.stem for path in recipes]

    text = recipes[0].read_text(encoding="utf-8")
    assert run("configs", recipes[0].stem).stdout == text
    assert run("configs", recipes[0].name, "--copy", tmp_path).exit_code == 0
    assert (tmp_path / recipes[0].name).read_text(encoding="utf-8") == text
    assert (tmp_path / "schema.json").is_file()
    assert run("validate", tmp_path / recipes[0].name).exit_code == 0

    again = run("configs", recipes[0].stem, "--copy", tmp_path)
    assert (again.exit_code, again.stderr) == (2, f"{tmp_path / recipes[0].name} exists; name another file\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("configs", "nope"), "no recipe named nope; there are: "),
        (("configs", "--copy", "x.yaml"), "--copy wants to know which"),
        (
            ("configs", "smollm2_135m_to_8l_fsdp2", "--copy", "/no/such/dir/x.yaml"),
            "/no/such/dir: no such directory",
        ),
    ],
)
def test_configs_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)


def test_schema_describes_every_section() -> None:
    schema = json.loads(run("schema").stdout)
    sections = list(schema["properties"])
    assert sections == [
        "student",
        "teacher",
        "distill",
        "data",
        "train",
        "log",
        "deepspeed",
    ]
    assert schema["additionalProperties"] is False


def test_env_names_versions_and_devices() -> None:
    import torch

    lines = dict(line.split(maxsplit=1) for line in run("env").stdout.splitlines() if " threads" not in line)
    assert lines["torch"] == torch.__version__
    assert lines["kd-plugin"] == kd.__version__
    assert lines["gloo"] == "available"
    assert {"python", "transformers", "deepspeed", "devices", "nccl"} <= set(lines)


def test_version() -> None:
    assert run("--version").stdout == f"kd-plugin {kd.__version__}\n"


@pytest.mark.parametrize("command", [(), ("validate",), ("train",), ("configs",), ("schema",), ("env",)])
def test_help_ends_with_examples(command: tuple[str, ...]) -> None:
    text = run(*command, "--help").stdout
    examples = [line.strip() for line in text.partition("Examples:\n")[2].splitlines()]
    assert len(examples) == 2
    for example in examples:
        assert "kd-plugin" in example or "kd_plugin" in example


def test_train_ignores_local_rank(config_file: Path, started: list[RunConfig]) -> None:
    assert run("--local_rank=1", "train", config_file, "train.seed=3").exit_code == 0
    assert run("train", "--local_rank=1", config_file, "train.seed=4").exit_code == 0
    assert [config.train.seed for config in started] == [3, 4]


@pytest.mark.parametrize(
    ("world_size", "overrides", "parallel"),
    [
        ("1", [], "single"),
        ("2", [], "fsdp"),
        ("2", ["train.parallel=auto"], "fsdp"),
        ("2", ["train.parallel=ddp"], "ddp"),
        ("2", ["train.parallel=fsdp1"], "fsdp1"),
        ("2", ["train.parallel=deepspeed"], "deepspeed"),
    ],
)
def test_train_fsdp_resolves_auto_by_the_number_of_ranks(
    config_file: Path,
    started: list[RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    world_size: str,
    overrides: list[str],
    parallel: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert train_fsdp.main([str(config_file), *overrides]) == 0
    assert [config.train.parallel for config in started] == [parallel]


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local_rank", "0"], ["--local-rank", "1"]])
def test_train_deepspeed_takes_the_launchers_local_rank(
    config_file: Path, started: list[RunConfig], flag: list[str]
) -> None:
    assert train_deepspeed.main([*flag, str(config_file), "train.max_steps=7"]) == 0
    assert [(config.train.parallel, config.train.max_steps) for config in started] == [("deepspeed", 7)]


def test_the_script_prevails_over_the_file_and_says_so(
    config_file: Path, started: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    with config_file.open("a") as file:
        file.write("train: {parallel: deepspeed}\n")
    assert train_fsdp.main([str(config_file)]) == 0
    assert started[0].train.parallel == "single"
    assert capsys.readouterr().out.startswith("train.parallel: deepspeed -> single (launch/train_fsdp.py")


def test_faults_are_printed_by_rank_0_only(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
    for rank, expected in (("0", "<command line>: oops: has no '='; write section.key=value\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert train_fsdp.main([str(config_file), "oops"]) == 2
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such\n  column"), "no such column"),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError: [Errno 2] No such file: 'x'"),
        (ImportError("needs gguf: pip install gguf"), "ImportError: needs gguf: pip install gguf"),
    ],
)
def test_what_a_user_can_cure_is_one_line(
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    line: str,
) -> None:
    def fail(config: RunConfig) -> None:
        raise error

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launcher, "run_training", fail)
    assert train_fsdp.main([str(config_file)]) == 2
    assert capsys.readouterr().err == f"error: {line} (-v shows where)\n"
    with pytest.raises(type(error)):
        train_fsdp.main([str(config_file), "-v"])


def test_other_ranks_wait_to_be_ended_before_they_repeat_an_error(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: RunConfig) -> None:
        raise SetupError("first fault\nsecond fault")

    waited: list[float] = []
    monkeypatch.setattr(launcher, "run_training", fail)
    monkeypatch.setattr(launcher.time, "sleep", waited.append)
    for rank, prefix in (("0", ""), ("1", "[rank 1] ")):
        monkeypatch.setenv("RANK", rank)
        assert train_fsdp.main([str(config_file)]) == 2
        assert capsys.readouterr().err == f"{prefix}first fault\n{prefix}second fault\n"
    assert len(waited) == 1 and waited[0] >= 10


def test_a_bug_keeps_its_traceback(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: RunConfig) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(launcher, "run_training", fail)
    with pytest.raises(RuntimeError, match="bug"):
        train_fsdp.main([str(config_file)])


def test_a_script_without_a_configuration_prints_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_fsdp.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: launch/train_fsdp.py CONFIG")


def test_a_recipe_s_name_stands_for_its_file(
    started: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "smollm2_135m_to_8l_fsdp2"
    for given in (name, f"{name}.yaml"):
        shown = run("validate", given, "train.max_steps=3")
        assert shown.exit_code == 0 and "train    3 steps" in shown.stdout
    assert run("train", name, "train.max_steps=4").exit_code == 0
    assert launcher.launch([name, "train.max_steps=5"], script="x", default="fsdp", allowed=["fsdp"]) == 0
    assert [config.train.max_steps for config in started] == [4, 5]
    assert "no such file" in run("validate", "nothing_of_that_name").stderr
    (tmp_path / name).write_text("oops: 1")
    assert "oops: unknown key" in run("validate", name).stderr, "a file goes before a recipe"
