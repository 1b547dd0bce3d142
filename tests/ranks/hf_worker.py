"""The Hugging Face Trainer and TRL's under the wrappers that accelerate puts around a student: FOLDER/<case>.pt.

What is replaced: on a CPU accelerate takes FSDP for no possibility and would wrap with DDP, by the name of the ranks'
kind alone; they are given the name that ranks with GPUs have. All that follows is accelerate's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from kd_plugin.hf import DistillTrainer, DistillTrainerMixin
from tests.hf_runs import ADAM, CONFIG, collate, make_pair, make_rows, make_tokenizer, options, with_labels
from tests.ranks.worker import save_of_all_ranks

WRAPPERS = ("ddp", "fsdp", "zero2", "zero3")
ROWS, HELD_OUT = with_labels(make_rows(50)), with_labels(make_rows(9, seed=9))
RAGGED = make_rows(40)
"""With rows that have no label: a rank may have none in a micro-batch."""


def settings(wrapper: str) -> dict[str, Any]:
    """Of TrainingArguments."""
    if wrapper == "fsdp":
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config |= {"cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    if not wrapper.startswith("zero"):
        return {}
    zero = {"stage": int(wrapper[-1]), "stage3_param_persistence_threshold": 0}
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    block = {**dict.fromkeys(automatic, "auto"), "zero_allow_untested_optimizer": True, "zero_optimization": zero}
    return {"deepspeed": block}


def make_trainer(kind: str, wrapper: str, folder: Path, **changed: Any) -> Trainer:
    """A trainer of two ranks with one row each in a micro-batch."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]  # of the case before
    trl = kind == "sft"
    if trl:
        from trl import SFTConfig as Arguments
    else:
        Arguments = TrainingArguments
    given = {**ADAM, "per_device_train_batch_size": 1, **settings(wrapper), **changed.pop("args", {})}
    args = Arguments(**options(folder, ddp_backend="gloo", **given))
    assert args.parallel_mode.value == "distributed"
    if wrapper == "fsdp":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    student, teacher = make_pair()
    distill = CONFIG.model_copy(update={"soft_on": changed.pop("soft_on", "trained")})
    common = {"model": student, "teacher": teacher, "distill": distill, "args": args, **changed}
    if not trl:
        return DistillTrainer(**common, train_dataset=RAGGED, eval_dataset=HELD_OUT, data_collator=collate)
    import datasets
    from trl import SFTTrainer

    class DistillSFTTrainer(DistillTrainerMixin, SFTTrainer):
        pass

    data = [datasets.Dataset.from_list(rows) for rows in (ROWS, HELD_OUT)]
    return DistillSFTTrainer(**common, train_dataset=data[0], eval_dataset=data[1], processing_class=make_tokenizer())


def run_case(kind: str, wrapper: str, folder: Path, **changed: Any) -> dict[str, Any]:
    """Train with a checkpoint a step and the best at the end, then resume the first in a new trainer."""
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    saving |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    if changed.get("teacher") == "by name":
        if dist.get_rank() == 0:
            make_pair()[1].save_pretrained(folder / "teacher")
        dist.barrier()
        changed["teacher"] = str(folder / "teacher")
    whole = make_trainer(kind, wrapper, folder / "whole", args={**saving, "load_best_model_at_end": True}, **changed)
    whole.train()
    whole.save_model(str(folder / "best"))
    again = make_trainer(kind, wrapper, folder / "again", **changed)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-1"))
    again.save_model(str(folder / "last"))
    dist.barrier()
    best, last = (load_file(folder / name / "model.safetensors") for name in ("best", "last"))
    return {
        "history": whole.state.log_history,
        "resumed": again.state.log_history,
        "best": best,
        "last": last,
        "best_checkpoint": Path(str(whole.state.best_model_checkpoint)).name,
        "wrapped": f"{type(whole.model_wrapped).__name__} {whole.accelerator.distributed_type.value}",
        "teacher_share": share_here(whole.plugin.teacher),
    }


def share_here(teacher: Any) -> float:
    """The share of the teacher's elements that this rank holds."""
    held = whole = 0
    for parameter in teacher.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held += partition.numel() if partition is not None else local.numel()
        whole += getattr(parameter, "ds_numel", parameter.numel())
    return held / whole


def run(folder: Path, spec: list[dict[str, Any]], rank: int) -> None:
    """Each entry of `spec`: name, kind ("trainer" or "sft"), wrapper, and keywords of the trainer."""
    for entry in spec:
        found = run_case(entry["kind"], entry["wrapper"], folder / entry["name"], **entry.get("changed", {}))
        save_of_all_ranks(folder / f"{entry['name']}.pt", found)
