"""`kd-plugin estimate`: its tables, its refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kd_plugin.cli.commands import app
from kd_plugin.estimate.account import EstimateError, estimate
from kd_plugin.settings.yaml_file import to_yaml
from tests.tiny_runs import make_folder, run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def command(folder: Path, *arguments: str, **sections: object) -> Result:
    path = folder / "estimated.yaml"
    path.write_text(to_yaml(run_config(folder, **sections)), encoding="utf-8")
    return CliRunner().invoke(app, ["estimate", str(path), *arguments], prog_name="kd-plugin")


def test_the_command_prints_plain_tables(folder: Path) -> None:
    result = command(folder, "--world-size", "4", "--gpu-memory-gib", "80", train={"parallel": "fsdp"})
    assert result.exit_code == 0, result.stderr
    grouped = command(folder, "--world-size", "4", "train.shard_size=2", "teacher.offload=true", "train.parallel=fsdp")
    for text in ("hsdp (FSDP2, 2 copies) on 4 x cuda", "in host memory: teacher", "gradients between copies"):
        assert text in grouped.stdout
    for text in ("memory of the fullest rank", "received per rank", "heads: stats", "sharding: ddp", "unknown, and"):
        assert text in result.stdout
    assert max(map(ord, result.stdout)) < 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "V100"), "--gpu V100 is not known here: give one of H100 PCIe, H100 NVL, H100, H200"),
        (("--world-size", "0"), "--world-size is 0: give the number of ranks"),
        (("--rows", "65"), "= 64 tokens: give 1 to 64"),
        (("--gpu-memory-gib", "0"), "--gpu-memory-gib is 0"),
        (("--world-size", "3"), "train.tokens_per_step 256 is no multiple"),
        (("--world-size", "4", "train.shard_size=3"), "train.shard_size is 3, wanted a divisor of the 4 ranks"),
        (("student.from_teacher.layers=9",), "the teacher has 4 layers"),
        (("teacher.model=/no/such/folder",), "no such directory /no/such/folder"),
    ],
)
def test_the_command_says_what_is_wrong(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = command(folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_single_process_is_refused_at_several_ranks(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.parallel is single but 2 processes"):
        estimate(run_config(folder, train={"parallel": "single"}), world_size=2)
    with pytest.raises(EstimateError, match="give the number of ranks"):
        estimate(run_config(folder), world_size=0)
