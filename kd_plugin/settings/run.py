# pyright: strict
"""Every setting and its default, as frozen pydantic models; nothing here imports torch.

Notable decisions:
- the models are the only place with defaults: YAML files and the command line state differences;
- unknown keys are refused, so that a misspelt option can never be ignored;
- a check that needs one section lives on that section, a check across sections on `RunConfig`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from pydantic.functional_validators import model_validator

from kd_plugin.settings.data import DataConfig, WeightedSource
from kd_plugin.settings.distill import DistillConfig, Section, TermConfig
from kd_plugin.settings.held_out import HeldOutMetric, StopConfig
from kd_plugin.settings.lora import LoraConfig
from kd_plugin.settings.quantization import Quantization
from kd_plugin.settings.teacher_input import TeacherInputConfig

__all__ = [
    "DataConfig",
    "DistillConfig",
    "FromTeacherConfig",
    "LogConfig",
    "LoraConfig",
    "ModelSource",
    "RunConfig",
    "StopConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherInputConfig",
    "TermConfig",
    "TrainConfig",
    "WeightedSource",
]

Precision = Literal["float32", "bfloat16", "float16", "auto"]


class FromTeacherConfig(Section):
    """A student cut out of its teacher."""

    layers: Annotated[int, Field(ge=2)]
    """Number of decoder layers kept: evenly spaced, first and last included (as distil-whisper)."""


class ModelSource(Section):
    """Where a model comes from."""

    model: str | None = None
    """Hub id, local directory, or `package:NAME` for the folder of an installed Python package."""

    gguf_file: str | None = None
    """Name of a GGUF file inside `model`; found by itself when the folder holds exactly one."""

    tokenizer: str | None = None
    """Tokenizer source, when it is not beside the model."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    dtype: Precision = "bfloat16"
    """Precision of the parameters (teacher) or of the forward and backward pass (student). `auto`: bfloat16, or float32
    where the device has no bfloat16 products of its own."""

    attn_implementation: str | None = None
    """Attention backend as in Transformers: `sdpa`, `eager`, `flash_attention_2`, ..."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    allow_pickle: bool = False
    """Load `.bin` weights, which can run code; otherwise safetensors and GGUF only."""


class TeacherConfig(ModelSource):
    """The frozen model that is learnt from."""

    model: Annotated[str, Field(min_length=1)]  # pyright: ignore[reportGeneralTypeIssues]  (this one is required)
    """Hub id, local directory, or `package:NAME` for the folder of an installed Python package."""

    sharding: Literal["shard", "replicate"] = "shard"
    """`shard`: FSDP2 over `train.shard_size` ranks, or ZeRO-3 over all; `replicate`: whole on each rank."""

    quantization: Quantization | None = None
    """Quantise the weights of its linear layers while they are loaded; the head, and an embedding tied to it, stay in
    `dtype`. `int8` and `int4`: weights only, by torchao; `bitsandbytes_8bit` (LLM.int8, with `data.packing: joined`)
    and `bitsandbytes_4bit` (NF4): by bitsandbytes; or a mapping as Transformers writes it into a config.json, e.g.
    {quant_method: bitsandbytes, load_in_4bit: true}. Needs `sharding: replicate` on several ranks."""

    offload: bool = False
    """Keep its parameters in host memory; each layer is copied to the GPU when it runs."""

    micro_batch_size: Literal["auto"] | PositiveInt | None = "auto"
    """Sequences of one optimizer step that it reads at once, ahead of the student: a multiple of
    `train.micro_batch_size`. Its sharded or offloaded weights are then gathered less often, for its last hidden states
    of a whole step in memory. `auto`: as many of the step's as the memory that the first steps leave free allows, the
    same on all ranks, as the log says; null: as the student."""

    input: TeacherInputConfig | None = None
    """What it reads of a conversation, where that is another text than the student's (context distillation):
    {system: You are ..., chat_template: teacher.jinja}. Both losses are on the answers alone, which have to be the same
    tokens in both texts: conversations of which they are not are left out, and counted."""


class StudentConfig(ModelSource):
    """The model that is trained: pretrained (`model`), cut from the teacher, or fresh."""

    from_teacher: FromTeacherConfig | None = None
    """Build the student from the teacher's layers instead of loading one."""

    from_config: dict[str, Any] | None = None
    """Fresh random student: the teacher's (or `model`'s) configuration with these values replaced,
    e.g. {num_hidden_layers: 4, hidden_size: 256}."""

    freeze: tuple[str, ...] = ()
    """Parameters whose name contains one of these strings are not trained."""

    lora: LoraConfig | None = None
    """Train adapters (LoRA) and leave the student's own weights as they are, e.g. {r: 16, lora_alpha: 32}; {} takes the
    defaults. The export is the student with its adapters merged; the adapters alone are in its folder `adapter`, with
    `student.model` (of a GGUF file, the folder that it was unpacked to) as their base."""

    @model_validator(mode="after")
    def _adapters_on_something_learnt(self) -> StudentConfig:
        if self.lora is not None and self.from_config is not None:
            raise ValueError(
                "student.lora freezes the student's own weights, which student.from_config draws at random, so most of "
                "the student would stay random: use student.model or student.from_teacher, or remove student.lora"
            )
        return self

    @model_validator(mode="after")
    def _one_origin(self) -> StudentConfig:
        if self.from_teacher and (self.model or self.from_config):
            raise ValueError("student.from_teacher excludes student.model and student.from_config: keep one of them")
        if not (self.from_teacher or self.from_config or self.model):
            raise ValueError(
                "student has no origin: set one of student.model, student.from_teacher, student.from_config"
            )
        return self


class TrainConfig(Section):
    """One run of the training loop."""

    parallel: Literal["auto", "single", "ddp", "fsdp", "fsdp1", "deepspeed"] = "auto"
    """How the student is distributed; `auto`: `fsdp` (FSDP2) when there are several ranks, else
    `single`. `fsdp1` is FullyShardedDataParallel, FSDP2's predecessor, which gathers more. launch/train_deepspeed.py
    sets `deepspeed`."""

    shard_size: PositiveInt | None = None
    """Consecutive ranks that one copy of student and teacher is sharded over (HSDP), e.g. the GPUs of a node;
    the copies exchange gradients only. Divides the number of ranks; null shards over all of them."""

    max_steps: PositiveInt = 100
    """Optimizer steps."""

    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How many times the training text is read; sets `max_steps`, whatever it says."""

    tokens_per_step: PositiveInt | None = None
    """Tokens of one optimizer step over all ranks; sets `gradient_accumulation_steps`."""

    micro_batch_size: PositiveInt = 1
    """Sequences per rank and forward pass."""

    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per rank and optimizer step."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    """Peak learning rate."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""

    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of all steps that warm up; sets `warmup_steps`, whatever it says."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up, down to `min_lr_ratio` of the peak at `max_steps`."""

    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step divided by the peak."""

    optimizer: Literal["auto", "adamw", "adamw_fused", "adamw_8bit"] = "auto"
    """`adamw_fused` updates all parameters in one kernel, `adamw` does not. `auto`: fused, but under DeepSpeed, and
    under FSDP1 in fp16, not. `adamw_8bit`: torchao's, which keeps both moments of a rank's part of a parameter in 8
    bits where that has 4096 numbers or more, a multiple of 256; not under DeepSpeed or FSDP1."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""

    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""

    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null switches clipping off."""

    activation_checkpointing: bool = False
    """Recompute the student's layers in backward instead of keeping their activations."""

    compile: bool = False
    """Compile the decoder layers of student and teacher with torch.compile, which takes a minute or two at the
    start. Not under ZeRO-3, which gathers weights inside of a layer."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initialisation and data order."""

    eval_every: Annotated[int, Field(ge=0)] = 0
    """Evaluate every so many steps, and at start and end; 0: at start and end only."""

    stop_on: StopConfig | None = None
    """End the run before `max_steps` when a held-out metric has stopped getting better, e.g.
    {metric: kl_t1, patience: 3, min_change: 0.01}; looked at every `eval_every` steps."""

    export_best: HeldOutMetric | None = None
    """Export the student of the evaluation that was best by this held-out metric, not the last one. It is kept in
    `log.output_dir`/best."""

    eval_sequences: PositiveInt | None = 64
    """Held-out sequences per evaluation, over all ranks and evenly spaced; null takes all. The evaluated text
    does not depend on the number of ranks."""

    eval_micro_batch_size: PositiveInt | None = None
    """Sequences per rank and forward pass in evaluation, which keeps no activations; null takes `micro_batch_size`."""

    save_every: Annotated[int, Field(ge=0)] = 0
    """Resumable checkpoint every so many steps; 0: none."""

    keep_checkpoints: PositiveInt = 2
    """Older checkpoints are removed."""

    resume: bool = False
    """Continue from the newest checkpoint in `log.output_dir`."""

    export: bool = True
    """Write the student with `save_pretrained` at the end."""

    process_group_timeout_s: PositiveInt = 600
    """A collective that waits longer than this ends the run with an error."""


class LogConfig(Section):
    """What is written while training."""

    output_dir: str = "runs/kd"
    """Folder of this run: config.yaml, TensorBoard files, checkpoints, export."""

    every: PositiveInt = 1
    """Log every so many steps."""

    tensorboard: bool = True
    """Write TensorBoard event files (rank 0)."""

    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """Trackers that get every number and the settings, through accelerate: e.g. [wandb]. `tensorboard` is what
    `log.tensorboard` switches; metrics.jsonl is always written."""

    sample_prompt: str | None = None
    """Prompt continued by teacher and student in the final report."""

    sample_tokens: PositiveInt = 40
    """New tokens in that continuation."""

    @model_validator(mode="after")
    def _one_word_on_tensorboard(self) -> LogConfig:
        if "tensorboard" in self.report_to and not self.tensorboard:
            raise ValueError("log.report_to names tensorboard, but log.tensorboard is false: change one of them")
        return self


class RunConfig(Section):
    """One YAML file: six sections, plus a raw `deepspeed:` block."""

    student: StudentConfig
    teacher: TeacherConfig
    distill: DistillConfig = DistillConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's own configuration; what `train` determines is filled in."""
