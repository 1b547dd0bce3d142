"""Options of the Trainer and of TRL's that take the loss or the sequences apart: refused by name, or distilled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer

from kd_plugin.hf import DistillTrainer, DistillTrainerMixin
from kd_plugin.hf.refusals import refuse_parallelism
from tests.hf_runs import (
    Reference,
    approximately,
    assert_same_parameters,
    history,
    make_rows,
    make_tokenizer,
    options,
    trainer_of,
)
from tests.loss_cases import config_of
from tests.refusals import refused


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.mean()


def mesh(**sizes: int) -> Any:
    from accelerate import ParallelismConfig

    return ParallelismConfig(**sizes)


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "label_smoothing_factor": (
        {"args": {"label_smoothing_factor": 0.1}},
        ["label_smoothing_factor=0.1", "DistillConfig(label_smoothing=0.1)"],
    ),
    "compute_loss_func": ({"compute_loss_func": own_loss}, ["compute_loss_func", "leave it out"]),
    "use_liger_kernel": ({"args": {"use_liger_kernel": True}}, ["use_liger_kernel", "leave it out"]),
    "ignore_index": ({"distill": config_of(ignore_index=0)}, ["ignore_index is 0", "-100"]),
    "tp": ({"args": {"parallelism_config": {"tp_size": 2}}}, ["tp_size=2", "tensor parallelism", "ZeRO-3"]),
    "cp": ({"args": {"parallelism_config": {"cp_size": 2}}}, ["cp_size=2", "context parallelism"]),
    "sp": (
        {"args": {"parallelism_config": {"sp_size": 2, "sp_backend": "deepspeed"}}},
        ["sp_size=2", "sequence parallelism"],
    ),
}


def with_mesh(changed: dict[str, Any]) -> dict[str, Any]:
    """`changed` with accelerate's own class where a parallelism_config is written out."""
    args = dict(changed.get("args", {}))
    if "parallelism_config" in args:
        args["parallelism_config"] = mesh(**args["parallelism_config"])
    return {**changed, "args": args}


@pytest.mark.parametrize("name", WRONG)
def test_the_trainer_refuses(tmp_path: Path, name: str) -> None:
    changed, words = WRONG[name]
    refused(lambda: trainer_of(DistillTrainer, tmp_path, **with_mesh(changed)), *words)


SFT_WRONG = {**WRONG, "dft": ({"args": {"loss_type": "dft"}}, ["loss_type='dft'", "leave it out"])}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # set by TRL itself
@pytest.mark.parametrize("name", SFT_WRONG)
def test_trl_s_trainer_refuses_too(tmp_path: Path, name: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class DistillSFTTrainer(DistillTrainerMixin, trl.SFTTrainer):
        pass

    changed, words = SFT_WRONG[name]
    changed = with_mesh(changed)
    args = trl.SFTConfig(**{**options(tmp_path), **changed.pop("args")})
    data = datasets.Dataset.from_list(make_rows(8))
    given = {"train_dataset": data, "processing_class": make_tokenizer(), "data_collator": None, **changed}
    refused(lambda: trainer_of(_with(DistillSFTTrainer, args), tmp_path, **given), *words)


def _with(kind: type[Trainer], args: Any) -> Any:
    return lambda **given: kind(**{**given, "args": args})


def test_several_gpus_without_a_launcher_are_refused(tmp_path: Path) -> None:
    """nn.DataParallel's copies would train without the teacher; the number of GPUs stands in the arguments."""
    trainer = trainer_of(DistillTrainer, tmp_path)
    trainer.args._n_gpu = 2
    refused(lambda: refuse_parallelism(trainer), "nn.DataParallel over 2 GPUs", "torchrun", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("changes", [{"is_distributed_loading_by_transformers": True}, {"get_tp_size": lambda: 2}])
def test_a_student_that_was_cut_when_it_was_loaded_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = trainer_of(DistillTrainer, tmp_path)
    vars(trainer).update(changes)
    refused(lambda: refuse_parallelism(trainer), "sharded when it was loaded", "load it whole")


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(DistillTrainer, tmp_path)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    trainer.accelerator = SimpleNamespace(state=state, distributed_type=None, parallelism_config=None)
    refused(lambda: refuse_parallelism(trainer), "FSDP version 1", "{'version': 2}")


def test_a_mesh_that_only_the_launcher_names_is_refused(tmp_path: Path) -> None:
    """`accelerate launch` hands it over in the environment, past the arguments."""
    trainer = trainer_of(DistillTrainer, tmp_path)
    trainer.accelerator.state.parallelism_config = mesh(cp_size=2)
    refused(lambda: refuse_parallelism(trainer), "cp_size=2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile's
def test_a_compiled_student_is_distilled(tmp_path: Path) -> None:
    """The graphs are torch.compile's; the backend that runs them needs no compiler."""
    rows = make_rows(40)
    reference = Reference(rows)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_of(DistillTrainer, tmp_path, args=compiled)
    trainer.train()
    assert history(trainer) == approximately(reference.losses)
    assert_same_parameters(trainer.accelerator.unwrap_model(trainer.model).state_dict(), reference.student)
