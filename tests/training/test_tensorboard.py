"""What TensorBoard shows is what was measured."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import kd_plugin as kd
from kd_plugin.divergences.measures import MEASURED
from kd_plugin.training.tensorboard import TAGS, NullWriter, make_writer
from tests.tiny_runs import make_folder, run_config

pytest.importorskip("tensorboard")

# Tags of every CPU run; on a GPU memory/peak_rss_gib gives way to what the allocator counts.
OTHERS = ("memory/peak_allocated_gib", "memory/peak_reserved_gib", "train/router_loss")
EXPECTED = {tag for tag in TAGS.values() if tag not in OTHERS}
EVALUATED = {"hard_loss", "soft_loss", "perplexity", *MEASURED}


def read(folder: Path) -> tuple[dict[str, dict[int, float]], list[str]]:
    """`{tag: {step: value}}` and the tags of texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: {point.step: point.value for point in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert all(len(events.Scalars(tag)) == len(points) for tag, points in scalars.items()), "a step appears twice"
    return scalars, events.Tags()["tensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def test_every_tag_is_there_and_equals_the_measured_number(folder: Path) -> None:
    log = {"output_dir": str(folder / "tags"), "tensorboard": True, "sample_prompt": "a"}
    result = kd.train(run_config(folder, log=log, train={"max_steps": 3, "eval_every": 2, "export": False}))
    scalars, texts = read(result.output_dir)
    assert set(scalars) == EXPECTED | {f"eval/{name}" for name in EVALUATED}
    for values in result.history:
        for name, value in values.items():
            if name in TAGS:
                assert scalars[TAGS[name]][values["step"]] == pytest.approx(value, rel=1e-6)
    assert set(scalars["eval/perplexity"]) == {0, 2, 3}
    assert scalars["eval/perplexity"][3] == pytest.approx(result.after["perplexity"], rel=1e-6)
    assert {text.split("/")[0] for text in texts} == {"config", "sample"}


def test_the_readme_explains_the_tag_of_every_metric(repo_root: Path) -> None:
    text = (repo_root / "README.md").read_text(encoding="utf-8")
    assert [name for name in MEASURED if f"`distill/{name}`" not in text] == []


def test_tags_are_plain() -> None:
    assert all(re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", tag) for tag in TAGS.values())


def test_a_resumed_run_shows_each_step_once(folder: Path) -> None:
    log = {"output_dir": str(folder / "resumed"), "tensorboard": True}
    train = {"max_steps": 4, "save_every": 2, "export": False}
    first = kd.train(run_config(folder, log=log, train=train))
    shutil.rmtree(first.output_dir / "checkpoints" / "step_00000004")
    kd.train(run_config(folder, log=log, train={**train, "resume": True}))
    scalars, _ = read(first.output_dir)
    assert sorted(scalars["train/loss"]) == [1, 2, 3, 4]


def test_nothing_is_written_when_switched_off(tmp_path: Path) -> None:
    with make_writer(tmp_path, enabled=False, first_step=0) as writer:
        writer.scalars(1, {"train/loss": 1.0})
        writer.text("config", "x")
    assert isinstance(writer, NullWriter) and not list(tmp_path.iterdir())
