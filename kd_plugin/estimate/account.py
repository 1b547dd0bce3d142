"""What a run will need, from its configuration alone: memory of a rank, bytes on the wire, time, and what to choose.

No weights are read and no process group is started, so a laptop can ask for a thousand GPUs. Time chooses where the
device is in the table of peaks, bytes elsewhere: a processor that is measured now may be busy with something else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kd_plugin.estimate.calibration import measured_speeds
from kd_plugin.estimate.from_config import gpu_speeds, make_setup
from kd_plugin.estimate.memory import Memory, memory
from kd_plugin.estimate.setup import EstimateError, Line, Setup, teacher_packed
from kd_plugin.estimate.sizes import load_sizes
from kd_plugin.estimate.speeds import Speeds
from kd_plugin.estimate.step_time import StepTime, is_counted, step_time
from kd_plugin.estimate.wire import Volume, exchanges, parameters, recommended, settled
from kd_plugin.settings.device_peaks import peaks_of
from kd_plugin.settings.distill import ExchangeMode
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.units import GIB
from kd_plugin.training.precision import automatic_dtype, with_dtypes
from kd_plugin.training.schedule import in_even_forwards, micro_batches_together

__all__ = ["Choice", "Estimate", "EstimateError", "estimate"]

_NODE = 8  # GPUs of a usual node, as one group of shards
USABLE = 0.9  # of a GPU's memory; the rest is left to the CUDA context, NCCL and fragmentation


@dataclass(frozen=True)
class Choice:
    """One way to spread the models, with the exchange that suits it."""

    mode: str
    shard_ranks: int
    """Ranks that one copy of a sharded model is cut over."""
    teacher_sharded: bool
    exchange: str
    peak_bytes: float
    step_bytes: float
    """Bytes that one rank receives per optimizer step."""
    step_seconds: float | None
    """Of an optimizer step; None where the device is not in the table of peaks, or the models' work is unknown."""
    fits: bool | None
    """Whether `peak_bytes` fit into a GPU; None where its memory was not given."""


@dataclass(frozen=True)
class Estimate:
    """What one configuration will need on so many ranks."""

    setup: Setup
    memory: Memory
    exchanges: dict[ExchangeMode, Volume]
    """Name -> bytes per micro-batch of every possible exchange, under the configured sharding."""
    exchange: str
    """The name of the exchange with the fewest bytes, which is recommended."""
    parameters: tuple[Line, ...]
    """All other traffic per optimizer step."""
    choices: tuple[Choice, ...]
    """Ways to spread the models: the fastest first where their time is known (less traffic, where they differ by less
    than about 1 %), else the one with the least traffic."""
    time: StepTime | None
    """Time of an optimizer step as configured; None for models that do not run on the meta device."""
    gpu_memory_gib: float | None

    @property
    def chosen(self) -> Choice | None:
        """The first choice that fits; None where none does, or nothing is known of the GPU."""
        return next((choice for choice in self.choices if choice.fits), None)


def estimate(
    config: RunConfig,
    *,
    world_size: int = 1,
    rows: int | None = None,
    gpu_memory_gib: float | None = None,
    device: str = "cuda",
    gpu: str | None = None,
    speeds: Speeds | None = None,
) -> Estimate:
    """Estimate memory, traffic and time of one run of `config`.

    Args:
        config: as for training; both models are built without weights. `dtype: auto` counts as bfloat16 on GPUs.
        world_size: number of ranks.
        rows: rows in the loss per rank and micro-batch; default: all its tokens.
        gpu_memory_gib: memory of one GPU in GiB, to say what fits.
        device: `cuda` or `cpu`; a CPU holds half-precision heads in fp32 as well.
        gpu: the GPU, by a name of `settings.device_peaks`, such as `H100`; default: the one that is here, or an H100.
        speeds: how fast a rank works; default: a GPU's by the table of peaks, a CPU's as measured now, which takes one
            to three seconds.

    Raises:
        ValueError: a model that cannot be made as configured, or ranks and rows that do not fit the settings.
    """
    if gpu_memory_gib is not None and gpu_memory_gib <= 0:
        raise EstimateError(f"--gpu-memory-gib is {gpu_memory_gib:g}: give the memory of one GPU, above 0")
    setup = _in_memory(_settled_setup(config, world_size, rows, device, gpu or _gpu_here()), gpu_memory_gib)
    return Estimate(
        setup=setup,
        memory=memory(setup),
        exchanges=exchanges(setup),
        exchange=recommended(setup),
        parameters=parameters(setup),
        choices=_choices(setup, gpu_memory_gib),
        time=_time(setup, speeds),
        gpu_memory_gib=gpu_memory_gib,
    )


def _time(setup: Setup, speeds: Speeds | None) -> StepTime | None:
    if not is_counted(setup):
        return None
    if speeds is None:
        speeds = gpu_speeds(setup) if setup.device == "cuda" else measured_speeds(setup)
    return step_time(setup, speeds)


def _gpu_here() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return name if peaks_of(name) else "H100"


def _settled_setup(config: RunConfig, world_size: int, rows: int | None, device: str, gpu: str) -> Setup:
    """The setup of `config` with nothing left on `auto`."""
    config = with_dtypes(config, "bfloat16" if device == "cuda" else automatic_dtype(torch.device(device))[0])
    setup = make_setup(config, load_sizes(config), world_size=world_size, rows=rows, device=device, gpu=gpu)
    return replace(setup, exchange=settled(setup))


def _in_memory(setup: Setup, gpu_memory_gib: float | None) -> Setup:
    """`setup` with as many micro-batches at once as fit, where `teacher.micro_batch_size` is `auto`."""
    if gpu_memory_gib is None or micro_batches_together(setup.config) is not None or setup.teacher is None:
        return setup
    every = range(setup.accumulation, 0, -1)
    fewer = dict.fromkeys(in_even_forwards(setup.accumulation, most) for most in every)  # most first, each once
    tried = (replace(setup, together=together) for together in fewer)
    fitting = (each for each in tried if memory(each).peak_bytes <= USABLE * gpu_memory_gib * GIB)
    return next(fitting, replace(setup, together=1))


def _choices(setup: Setup, gpu_memory_gib: float | None) -> tuple[Choice, ...]:
    may_shard = setup.world_size > 1 and setup.teacher is not None and teacher_packed(setup) is None
    sharded = (False, True) if may_shard else (False,)
    choices = [_choice(setup, layout, cut, gpu_memory_gib) for layout in _layouts(setup) for cut in sharded]
    return tuple(sorted(choices, key=_rank))


def _rank(choice: Choice) -> tuple[float, ...]:
    seconds = float(f"{choice.step_seconds or 0.0:.3g}")
    return seconds, choice.step_bytes, choice.peak_bytes


def _layouts(setup: Setup) -> list[tuple[str, int]]:
    """Ways to spread the student under the backend of `setup`: its mode, and the ranks that one copy is cut over."""
    world, grouped = setup.world_size, setup.shard_ranks
    if world == 1:
        return [(setup.mode, world)]
    if setup.is_zero:
        return [(f"zero{stage}", world) for stage in (1, 2, 3)]
    node = {_NODE} if world % _NODE == 0 else set()
    groups = sorted({grouped, world, *node} - {1})
    cut = "fsdp1" if setup.mode == "fsdp1" else "fsdp"
    return [("ddp", grouped if grouped > 1 else world), *((cut, size) for size in groups)]


def _choice(setup: Setup, layout: tuple[str, int], teacher_sharded: bool, gpu_memory_gib: float | None) -> Choice:
    mode, shard_ranks = layout
    spread = setup.spread(mode=mode, teacher_sharded=teacher_sharded, shard_ranks=shard_ranks)
    spread = _in_memory(replace(spread, exchange=recommended(spread)), gpu_memory_gib)
    step = setup.accumulation * exchanges(spread)[spread.exchange].num_bytes
    step += sum(line.num_bytes for line in parameters(spread))
    peak = memory(spread).peak_bytes
    fits = None if gpu_memory_gib is None else peak <= USABLE * gpu_memory_gib * GIB
    taken = step_time(spread, gpu_speeds(spread)) if setup.device == "cuda" else None
    seconds = None if taken is None else taken.seconds
    return Choice(mode, shard_ranks, teacher_sharded, spread.exchange, peak, step, seconds, fits)
