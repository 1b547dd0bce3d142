"""Two ranks over gloo train adapters (`student.lora`) like one process, under every layout, save, resume and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

import kd_plugin as kd
from kd_plugin.training.run import TrainResult
from tests.ranks import train_worker
from tests.ranks.launch import Launch, Launched
from tests.ranks.train_entries import run
from tests.tiny_runs import curve, make_folder, make_teacher, run_config

LAYOUTS = ("fsdp", "zero3")
MORE_LAYOUTS = ("fsdp1", "ddp", "zero0", "zero1", "zero2")
SAVING, MORE_SAVING = ("fsdp",), ("fsdp1", "ddp", "zero2", "zero3")
SAVED = {"max_steps": 4, "save_every": 2}
LORA = {"r": 3, "lora_alpha": 12}
# Of few small layers, which may all lie on one rank; the head is trained whole
FEW = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


def prepare(folder: Path) -> None:
    make_folder(folder)
    make_teacher(folder / "student", layers=2)


def student(lora: dict[str, Any], folder: str = "{folder}") -> dict[str, Any]:
    return {"from_teacher": None, "model": f"{folder}/student", "lora": lora}


def entries(layouts: tuple[str, ...], saving: tuple[str, ...]) -> list[dict[str, Any]]:
    few = [run(f"{name}_few", name, student=student(FEW), train={"export": False}) for name in layouts]
    whole = [run(name, name, student=student(LORA)) for name in layouts]
    saved = [
        entry
        for name in saving
        for entry in (
            run(f"{name}_whole", name, student=student(LORA), train=SAVED, output=f"{name}_saved", keep=2),
            run(
                f"{name}_resumed",
                name,
                student=student(LORA),
                train={**SAVED, "resume": True},
                output=f"{name}_saved",
            ),
        )
    ]
    return [*whole, *few, *saved]


HALF = [(name, "auto") for name in ("fsdp", "fsdp1", "zero0", "zero3")] + [("fsdp", "logits"), ("fsdp", "stats")]
HALVES = [
    run(
        f"{name}_{exchange}_bfloat16",
        name,
        student={**student(LORA), "dtype": "bfloat16"},
        distill={"exchange": exchange},
    )
    for name, exchange in HALF
]
COPIES = [run("hsdp", "fsdp", student=student(LORA), train={"shard_size": 2, "micro_batch_size": 1})]


LAUNCHES = {
    "two": Launch(
        train_worker,
        ranks=2,
        spec=entries(LAYOUTS, SAVING),
        prepare=prepare,
        together="deepspeed",
        needs_deepspeed=True,
    ),
    "more": Launch(
        train_worker,
        ranks=2,
        spec=[*entries(MORE_LAYOUTS, MORE_SAVING), *HALVES],
        prepare=prepare,
        needs_deepspeed=True,
    ),
    "four": Launch(train_worker, ranks=4, spec=COPIES, prepare=prepare),
}


def of_all(layouts: tuple[str, ...], more: tuple[str, ...]) -> list[Any]:
    return [*(("two", name) for name in layouts), *(pytest.param("more", n, marks=pytest.mark.slow) for n in more)]


@pytest.fixture(scope="module")
def results_of(launched: Callable[[str], Launched]) -> Callable[[str], dict[str, Any]]:
    """The runs of a launch by name, as its first rank saw them."""

    def results(launch: str) -> dict[str, Any]:
        first, *others = launched(launch).file("results.pt")
        assert all(curve(other[name]) == curve(result) for other in others for name, result in first.items())
        return first

    return results


@pytest.fixture(scope="module")
def singles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    """The same runs in one process: adapters on all layers, and few of them."""
    folder = tmp_path_factory.mktemp("single")
    prepare(folder)
    return {
        name: kd.train(
            run_config(folder, f"single{name}", student=student(lora, str(folder)), train={"parallel": "single"})
        )
        for name, lora in (("", LORA), ("_few", FEW))
    }


@pytest.mark.parametrize("kind", ["", "_few"])
@pytest.mark.parametrize(("launch", "name"), of_all(LAYOUTS, MORE_LAYOUTS))
def test_two_ranks_train_adapters_like_one_process(
    results_of: Callable[[str], dict[str, Any]], singles: dict[str, TrainResult], launch: str, name: str, kind: str
) -> None:
    result, single = results_of(launch)[name + kind], singles[kind]
    for number in ("loss", "grad_norm", "kl_t1", "valid_tokens"):
        assert curve(result, number) == pytest.approx(curve(single, number), rel=2e-5, abs=1e-6), number
    assert result["before"] == pytest.approx(single.before, rel=2e-5)
    assert result["after"] == pytest.approx(single.after, rel=1e-4)


@pytest.mark.parametrize(("launch", "name"), of_all(LAYOUTS, MORE_LAYOUTS))
def test_two_ranks_export_what_one_process_exports(
    results_of: Callable[[str], dict[str, Any]], singles: dict[str, TrainResult], launch: str, name: str
) -> None:
    folder, other = Path(results_of(launch)[name]["export"]), singles[""].export_dir
    assert other is not None
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        found, wanted = load_file(folder / file), load_file(other / file)
        assert found.keys() == wanted.keys()
        assert all((found[key] - value).abs().max() < 1e-5 for key, value in wanted.items()), file


@pytest.mark.parametrize(("launch", "name"), of_all(SAVING, MORE_SAVING))
def test_resuming_continues_bit_for_bit_from_adapters_alone(
    launched: Callable[[str], Launched], results_of: Callable[[str], dict[str, Any]], launch: str, name: str
) -> None:
    whole, resumed = results_of(launch)[f"{name}_whole"], results_of(launch)[f"{name}_resumed"]
    assert curve(resumed, "step") == [3, 4]
    assert curve(resumed) == curve(whole)[2:] and curve(resumed, "grad_norm") == curve(whole, "grad_norm")[2:]
    assert resumed["after"] == whole["after"]
    saved = launched(launch).folder / f"{name}_saved" / "checkpoints" / "step_00000004" / "engine"
    names = names_of_deepspeed(saved) if name.startswith("zero") else names_of_torch(saved)
    assert names and all(".lora_" in weight for weight in names)


@pytest.mark.slow
def test_copies_of_shards_train_and_export_like_one_process(
    results_of: Callable[[str], dict[str, Any]], singles: dict[str, TrainResult]
) -> None:
    result, single = results_of("four")["hsdp"], singles[""]
    assert curve(result) == pytest.approx(curve(single), rel=2e-5)
    assert curve(result, "grad_norm") == pytest.approx(curve(single, "grad_norm"), rel=1e-4)
    assert single.export_dir is not None
    found, wanted = (load_file(Path(folder) / "model.safetensors") for folder in (result["export"], single.export_dir))
    assert all((found[key] - value).abs().max() < 1e-5 for key, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "exchange"), HALF)
def test_half_precision_follows_full_precision(
    results_of: Callable[[str], dict[str, Any]], singles: dict[str, TrainResult], name: str, exchange: str
) -> None:
    result, single = results_of("more")[f"{name}_{exchange}_bfloat16"], singles[""]
    assert curve(result) == pytest.approx(curve(single), rel=0.03) and curve(result) != curve(single)
    exported = load_file(Path(result["export"]) / "model.safetensors")
    assert {str(value.dtype) for value in exported.values()} == {"torch.bfloat16"}


def names_of_torch(folder: Path) -> set[str]:
    """The student's weights in a checkpoint."""
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name for name in found if name.startswith("model.")}


def names_of_deepspeed(folder: Path) -> set[str]:
    return {
        name for path in folder.rglob("*model_states.pt") for name in torch.load(path, weights_only=False)["module"]
    }
