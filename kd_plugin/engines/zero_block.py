"""DeepSpeed configurations of student and teacher, filled from the training settings.

Notable decisions:
- the `deepspeed:` block is passed through; only what `train.*` determines is filled in, and said aloud;
- `"auto"` is understood where Transformers users write it, since DeepSpeed itself does not know the word;
- all values that contradict `train.*` are refused together, in one error;
- DeepSpeed ignores a top-level key that it does not know, so a misspelt one is refused here;
- a sharded teacher is a ZeRO-3 engine of its own without optimizer, whatever the student's stage is.

No torch and no DeepSpeed is imported here: these are dictionaries.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from kd_plugin.settings.run import RunConfig

__all__ = [
    "KNOWN_KEYS",
    "DeepSpeedConfigError",
    "conflicts",
    "shards_teacher",
    "student_config",
    "teacher_config",
    "uses_autocast",
    "zero_stage",
]

AUTO = "auto"
DEFAULT_STAGE = 3
_GATHERING_OPTIONS = (
    "reduce_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
    "offload_param",
)
_SECTIONS = frozenset(
    "activation_checkpointing aio autotuning bf16 checkpoint comet comms_logger compile csv_monitor data_efficiency "
    "data_types datastates_ckpt expert_parallel flops_profiler fp16 hybrid_engine optimizer pipeline scheduler "
    "tensor_parallel tensorboard timers torch_autocast wandb weight_quantization zero_optimization".split()
)
KNOWN_KEYS = _SECTIONS | frozenset(
    "communication_data_type dataloader_drop_last disable_allgather disable_python_gc dump_state "
    "gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level "
    "managed_gradient_accumulation memory_breakdown prescale_gradients seq_parallel_communication_data_type "
    "steps_per_print train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism "
    "vocabulary_size wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer".split()
)
"""Top-level keys that DeepSpeed 0.19 reads. Left out: what it has removed, and `bfloat16`, which it ignores
where `bf16` is given (and it always is, see `_wanted`)."""


class DeepSpeedConfigError(ValueError):
    """The `deepspeed:` block contradicts the training settings, or asks for what is not there."""


def zero_stage(block: Mapping[str, Any] | None) -> int:
    """The student's ZeRO stage; 3 when the block does not say."""
    stage = ((block or {}).get("zero_optimization") or {}).get("stage", AUTO)
    return DEFAULT_STAGE if stage == AUTO else stage


def uses_autocast(block: Mapping[str, Any] | None) -> bool:
    """Whether the engine of `block` runs forwards under `torch.autocast`."""
    return bool(_get(block or {}, "torch_autocast.enabled"))


def student_config(
    config: RunConfig, *, world_size: int, accumulation: int, hidden_size: int
) -> tuple[dict[str, Any], list[str]]:
    """The student's complete DeepSpeed configuration, and one line for each value that was filled in.

    Raises:
        DeepSpeedConfigError: naming every value that contradicts `train.*` and every "auto" left over.
    """
    block = copy.deepcopy(config.deepspeed or {})
    problems = _take_out_faulty(block)
    wanted = _wanted(config, world_size, accumulation, zero_stage(block)) | _sizes(block, hidden_size)
    filled, contradictions = _fill(block, config, wanted)
    if problems := problems + contradictions:
        raise DeepSpeedConfigError("; ".join(problems) + ": change or remove these keys, or write auto")
    _settle_offload(block, filled)
    return block, filled


def conflicts(config: RunConfig, *, world_size: int | None = None, accumulation: int | None = None) -> list[str]:
    """One line for each thing that `student_config` would refuse, before any model is there.

    What depends on `world_size` or `accumulation` is left out where they are None.
    """
    block = copy.deepcopy(config.deepspeed or {})
    problems = _take_out_faulty(block)
    wanted = _wanted(config, world_size or 1, accumulation or 1, zero_stage(block)) | _sizes(block, hidden_size=1)
    unknown = {"train_batch_size"} if world_size is None or accumulation is None else set()
    if accumulation is None and config.train.tokens_per_step is not None:
        unknown.add("gradient_accumulation_steps")
    for key in unknown:
        wanted.pop(key)
        block.pop(key, None)
    return problems + _fill(block, config, wanted)[1]


def _take_out_faulty(block: dict[str, Any]) -> list[str]:
    """Remove from `block` what no value can be read from; returns one line for each such key, which says why.

    These are keys that another setting governs or DeepSpeed does not know, and scalars where it wants a mapping.
    """
    problems = _refusals(block)
    for key, value in list(block.items()):
        if key in _GOVERNED and (value or key in KNOWN_KEYS):
            del block[key]
        elif fault := _fault(key, value):
            problems.append(fault)
            del block[key]
    optimizer = block.get("optimizer")
    if optimizer and not isinstance(optimizer.get("params", {}), Mapping):
        problems.append(
            f"deepspeed.optimizer.params is {optimizer.pop('params')!r}, wanted a mapping such as {{lr: auto}}"
        )
    return problems


def _fault(key: str, value: Any) -> str:
    """What is wrong with a top-level key that nothing else governs; empty for nothing."""
    if key not in KNOWN_KEYS:
        near = difflib.get_close_matches(str(key), sorted(KNOWN_KEYS), n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return f"deepspeed.{key} is no key that DeepSpeed reads{hint}"
    if key in _SECTIONS and value is not None and not isinstance(value, Mapping):
        example = {"zero_optimization": "{stage: 3}", "optimizer": "{type: AdamW}"}.get(key, "{enabled: true}")
        return f"deepspeed.{key} is {value!r}, wanted a mapping such as {example}"
    return ""


def _fill(
    block: dict[str, Any], config: RunConfig, wanted: Mapping[str, tuple[Any, str]]
) -> tuple[list[str], list[str]]:
    """Put `wanted`, and the optimizer's parameters, into `block`.

    Returns one line for each value filled in, and one for each that contradicts or is left on "auto".
    """
    filled, problems = _fill_in(block, wanted)
    stage = zero_stage(block)
    if stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage is {stage!r}, wanted 0, 1, 2 or 3")
    optimizer_filled, contradictions = _fill_in(block, _wanted_of_optimizer(block, config))
    problems += contradictions
    problems += [f"deepspeed.{key} is 'auto', which nothing here determines" for key in _autos(block)]
    return filled + optimizer_filled, problems


def _fill_in(block: dict[str, Any], wanted: Mapping[str, tuple[Any, str]]) -> tuple[list[str], list[str]]:
    """Put each value of `wanted`, which has its reason beside it, where `block` has none or "auto"."""
    filled: list[str] = []
    contradictions: list[str] = []
    for key, (value, reason) in wanted.items():
        given = _get(block, key)
        if given is None or given == AUTO:
            _set(block, key, value)
            filled.append(f"deepspeed.{key}: {value} ({reason})")
        elif not _agree(given, value):
            contradictions.append(f"deepspeed.{key} is {given} but {reason} makes it {value}")
    return filled, contradictions


def shards_teacher(config: RunConfig, world_size: int) -> bool:
    """Whether the teacher is in a ZeRO-3 engine; else it is whole on each rank."""
    return config.teacher.offload or (config.teacher.sharding == "shard" and world_size > 1)


def teacher_config(student: Mapping[str, Any], *, precision: str, offload: bool = False) -> dict[str, Any]:
    """A DeepSpeed configuration for the frozen teacher: ZeRO-3 without optimizer, gathering as the student's says.

    What is "auto" there stays DeepSpeed's own default. `offload` keeps the teacher's parameters in host memory, by the
    student's `offload_param` where that says how.
    """
    source = student.get("zero_optimization", {})
    zero = {key: copy.deepcopy(source[key]) for key in _GATHERING_OPTIONS if source.get(key, AUTO) != AUTO}
    if offload and (zero.get("offload_param") or {}).get("device", "none") == "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; it is used in training only
        "zero_optimization": {**zero, "stage": 3},
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {"enabled": precision == "float16"},
    }


def _wanted(config: RunConfig, world_size: int, accumulation: int, stage: Any) -> dict[str, tuple[Any, str]]:
    train, precision = config.train, config.student.dtype
    batch = train.micro_batch_size * accumulation * world_size
    batch_reason = f"micro_batch_size {train.micro_batch_size} x accumulation {accumulation} x {world_size} ranks"
    clip = train.max_grad_norm or 0.0
    halves = {
        f"{short}.enabled": (precision == name, f"student.dtype {precision}")
        for short, name in (("bf16", "bfloat16"), ("fp16", "float16"))
        if precision != "auto"  # which the launch settles
    }
    return {
        "train_batch_size": (batch, batch_reason),
        "train_micro_batch_size_per_gpu": (train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": (accumulation, "train.gradient_accumulation_steps or tokens_per_step"),
        "gradient_clipping": (clip, "train.max_grad_norm"),
        **halves,
        "zero_optimization.stage": (stage, "default"),
    }


def _sizes(block: Mapping[str, Any], hidden_size: int) -> dict[str, tuple[Any, str]]:
    """ZeRO-3's sizes where they are "auto", by the rules of Transformers; without "auto" DeepSpeed's defaults stay."""
    rules = {
        "zero_optimization.reduce_bucket_size": (hidden_size**2, "hidden_size ** 2"),
        "zero_optimization.stage3_prefetch_bucket_size": (int(0.9 * hidden_size**2), "0.9 hidden_size ** 2"),
        "zero_optimization.stage3_param_persistence_threshold": (10 * hidden_size, "10 hidden_size"),
    }
    return {key: rule for key, rule in rules.items() if _get(block, key) == AUTO}


_GOVERNED = {
    "scheduler": "train.schedule",
    "sparse_attention": "the model (student.attn_implementation)",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
}


def _refusals(block: Mapping[str, Any]) -> list[str]:
    """One line for each block that would take over what the training loop does."""
    return [f"deepspeed.{key} is set but {owner} does this" for key, owner in _GOVERNED.items() if block.get(key)]


def _wanted_of_optimizer(block: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, str]]:
    """What `train.*` makes of the user's own `optimizer:` block, if there is one."""
    if not block.get("optimizer"):
        return {}
    train = config.train
    wanted: dict[str, tuple[Any, str]] = {
        "lr": (train.learning_rate, "train.learning_rate"),
        "weight_decay": (train.weight_decay, "train.weight_decay"),
    }
    if "adam" in str(block["optimizer"].get("type", "")).lower():
        wanted["betas"] = (list(train.adam_betas), "train.adam_betas")
        wanted["eps"] = (train.adam_eps, "train.adam_eps")
    return {f"optimizer.params.{name}": value for name, value in wanted.items()}


def _settle_offload(block: dict[str, Any], filled: list[str]) -> None:
    """DeepSpeed refuses a torch optimizer on offloaded states unless it is told to accept it."""
    device = _get(block, "zero_optimization.offload_optimizer.device")
    if device in (None, "none") or block.get("optimizer"):
        return
    if block.setdefault("zero_force_ds_cpu_optimizer", False) is False:
        filled.append("deepspeed.zero_force_ds_cpu_optimizer: False (the optimizer is torch.optim.AdamW)")


def _get(block: Mapping[str, Any], key: str) -> Any:
    value: Any = block
    for part in key.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _set(block: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(block.get(part), dict):
            block[part] = {}
        block = block[part]
    block[last] = value


def _agree(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return isinstance(given, (int, float)) and abs(given - wanted) <= 1e-12 * max(1.0, abs(wanted))
    if isinstance(wanted, list):
        return isinstance(given, (list, tuple)) and list(given) == wanted
    return given == wanted


def _autos(block: Any, prefix: str = "") -> list[str]:
    if isinstance(block, Mapping):
        return [key for name, value in block.items() for key in _autos(value, f"{prefix}.{name}" if prefix else name)]
    return [prefix] if block == AUTO else []
