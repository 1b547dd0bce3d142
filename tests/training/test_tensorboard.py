"""What TensorBoard shows is what was measured."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import kd_plugin as kd
from kd_plugin.divergences.measures import MEASURED
from kd_plugin.training.charts import CHARTS, LAYOUT, describe, hyperparameters
from kd_plugin.training.metrics_file import MetricsFile, read_metrics
from kd_plugin.training.tensorboard import TAGS, verbatim
from tests.tiny_runs import make_folder, run_config

pytest.importorskip("tensorboard")

# Tags of every CPU run; on a GPU memory/peak_rss_gib gives way to what the allocator counts.
OTHERS = ("memory/peak_allocated_gib", "memory/peak_reserved_gib", "train/router_loss", "distill/trained_tokens")
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


@pytest.fixture(scope="module")
def result(folder: Path) -> kd.TrainResult:
    log = {"output_dir": str(folder / "tags"), "tensorboard": True, "sample_prompt": "a"}
    return kd.train(run_config(folder, log=log, train={"max_steps": 3, "eval_every": 2, "export": False}))


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_every_tag_is_there_and_equals_the_measured_number(result: kd.TrainResult) -> None:
    scalars, texts = read(result.output_dir)
    assert set(scalars) == EXPECTED | {f"eval/{name}" for name in EVALUATED}
    for values in result.history:
        for name, value in values.items():
            if name in TAGS:
                assert scalars[TAGS[name]][values["step"]] == pytest.approx(value, rel=1e-6)
    assert set(scalars["eval/perplexity"]) == {0, 2, 3}
    assert scalars["eval/perplexity"][3] == pytest.approx(result.after["perplexity"], rel=1e-6)
    assert {text.split("/")[0] for text in texts} == {"config", "sample", "custom_scalars__config__"}


def test_soft_hard_and_total_are_lines_of_one_chart_that_sorts_first(result: kd.TrainResult) -> None:
    scalars, _ = read(result.output_dir)
    everywhere = set(scalars)
    for chart, lines in CHARTS.items():
        for line, source in lines.items():
            drawn, _ = read(result.output_dir / "lines" / line) if line != "router" else ({}, [])
            assert line == "router" or drawn[chart] == scalars[source]
            everywhere |= set(drawn)
    assert sorted(everywhere)[0].startswith("a_loss/") and sorted({tag.split("/")[0] for tag in everywhere})[-1] == (
        "z_constant"
    )
    assert set(CHARTS["a_loss/components"]) == {"total", "soft", "hard", "router"}


def test_every_tag_says_what_it_means(result: kd.TrainResult) -> None:
    scalars, _ = read(result.output_dir)
    events = events_of(result.output_dir)
    for tag in scalars:
        assert events.SummaryMetadata(tag).summary_description == describe(tag) != "", tag
    assert all(describe(tag) for tag in [*CHARTS, *TAGS.values()])
    assert "held-out" in describe("eval/kl_t1") and describe("eval/unknown") == ""


def test_samples_stand_at_the_step_they_were_made_as_they_are(result: kd.TrainResult) -> None:
    events = events_of(result.output_dir)
    (sample,) = events.Tensors("sample/student/text_summary")
    assert sample.step == 3
    assert verbatim("a\n# b") == "    a\n    # b"


def test_settings_are_hparams_of_the_run(result: kd.TrainResult, folder: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    contents = events_of(result.output_dir).PluginTagToContent("hparams")
    assert set(contents) == {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
    started = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    wanted = hyperparameters(run_config(folder, train={"max_steps": 3, "eval_every": 2, "export": False}))
    assert set(started.hparams) == set(wanted)
    assert started.hparams["train.learning_rate"].number_value == 5e-3
    assert started.hparams["distill.divergence"].string_value == "forward_kl"


def test_the_custom_layout_matches_tags_that_are_written(result: kd.TrainResult) -> None:
    scalars, _ = read(result.output_dir)
    for charts in LAYOUT.values():
        for title, (_, expressions) in charts.items():
            assert all(any(re.search(e, tag) for tag in scalars) for e in expressions), title


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl_has_every_number_under_its_tag(result: kd.TrainResult) -> None:
    scalars, _ = read(result.output_dir)
    lines = lines_of(result.output_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 3]
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for tag in set(line) - {"step", "time"}:
            found.setdefault(tag, {})[line["step"]] = line[tag]
    assert found.keys() == scalars.keys()
    assert all(found[tag] == pytest.approx(scalars[tag], rel=1e-6) for tag in found)


def test_metrics_jsonl_of_a_continued_run_goes_on_after_its_last_step(tmp_path: Path) -> None:
    with MetricsFile(tmp_path, done=None) as file:
        for step in (1, 2, 3):
            file.scalars(step, {"train/loss": math.nan if step == 1 else float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as cut:
        cut.write('{"step": 4, "tra')
    assert [line["train/loss"] for line in read_metrics(tmp_path, until=9)] == [None, 2.0, 3.0]
    with MetricsFile(tmp_path, done=2) as file:
        file.scalars(3, {"train/loss": 7.0})
    assert [(line["step"], line["train/loss"]) for line in lines_of(tmp_path)] == [(1, None), (2, 2.0), (3, 7.0)]
    with MetricsFile(tmp_path, done=None):
        pass
    assert lines_of(tmp_path) == []


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
    drawn, _ = read(first.output_dir / "lines" / "soft")
    assert drawn["a_loss/components"] == scalars["train/soft_loss"]
    losses = [line["step"] for line in lines_of(first.output_dir) if "train/loss" in line]
    assert losses == [1, 2, 3, 4]


def test_without_tensorboard_metrics_jsonl_is_written_alone(folder: Path) -> None:
    log = {"output_dir": str(folder / "without"), "tensorboard": False}
    done = kd.train(run_config(folder, log=log, train={"max_steps": 1, "export": False}))
    assert [line["step"] for line in lines_of(done.output_dir)] == [0, 1, 1]
    assert sorted(path.name for path in done.output_dir.iterdir()) == ["config.yaml", "metrics.jsonl", "summary.json"]
