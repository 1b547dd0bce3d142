"""What a training's parameters do not show: traffic, memory, and how ranks that do not fit together are refused.

Only the heads are sharded here, so that everything seen is theirs. Every probe takes this process's rank.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import kd_plugin as kd
from benchmarks.received import Received
from kd_plugin.engines import fsdp1_units, fsdp_units, zero_block
from tests.allocations import NewTensors
from tests.ranks.attach_cases import make_model
from tests.ranks.collectives import CollectiveLog, local_shard

VOCAB_SIZE, STUDENT_WIDTH, TEACHER_WIDTH, CHUNK = 1021, 16, 24, 8  # of the memory probe
TRAFFIC_ROWS, TRAFFIC_VOCAB, TRAFFIC_WIDTH = 2048, 49152, 576
# In the rounds of `make_config`: two for each of four softmaxes, the label's logit, agreement; no sums.
NUMBERS = (10, 0)
# More than pay for `stats` where the teacher's head need not be gathered, and as few as pay for its share alone
AUTO_ROWS = (120, 40)
# Divergence -> rounds of statistics per chunk
ROUNDS = dict.fromkeys(("forward_kl", "soft_ce", "reverse_kl", "logit_mse"), 1)
ROUNDS |= dict.fromkeys(("jsd", "tvd", "acceptance", "cosine"), 2)
FEWER_ROWS = ("student tied", "ddp", "zero3")
LOGITS_ROWS, LOGITS_VOCAB, LOGITS_WIDTH = 256, 4096, 64


def shard_head(model: nn.Module) -> None:
    """Only the head is an FSDP unit; everything else stays whole, and the embedding is frozen."""
    head = model.get_output_embeddings()
    model.get_input_embeddings().requires_grad_(False)
    mesh = fsdp_units.make_mesh("cpu", dist.get_world_size())
    fully_shard(head, mesh=mesh)
    if head.weight.requires_grad:
        head.set_unshard_in_backward(False)
    others = set(model.parameters()) - set(head.parameters())
    fully_shard(model, mesh=mesh, ignored_params=others, reshard_after_forward=True)


def make_student(
    config: kd.DistillConfig, vocab_size: int, widths: tuple[int, int], head_size: int | None = None
) -> Any:
    """-> (student, plugin), heads sharded; `head_size` rows in both heads instead of the vocabulary's."""
    models = [make_model("llama", width, vocab_size, seed=i) for i, width in enumerate(widths)]
    if head_size is not None:
        for model in models:
            head = nn.utils.skip_init(nn.Linear, model.config.hidden_size, head_size, bias=False)
            nn.init.constant_(head.weight, 0.01)
            model.set_output_embeddings(head)
    student, teacher = models
    plugin = kd.attach(student, teacher, config)
    shard_head(student)
    shard_head(teacher)
    return student, plugin


def make_config(exchange: str, **changes: Any) -> kd.DistillConfig:
    """Temperature 2, so that there are two softmaxes for each model."""
    settings = {"temperature": 2.0, "chunk_size": CHUNK, "row_kernel": "eager", "exchange": exchange, **changes}
    return kd.DistillConfig(**settings)


def _step(student: nn.Module, input_ids: Tensor) -> None:
    """One forward and backward in which every row counts."""
    items = input_ids.numel() * dist.get_world_size()
    student(input_ids, shift_labels=input_ids, num_items_in_batch=items).loss.backward()
    student.zero_grad()


def memory(rank: int) -> list[tuple[int, ...]]:
    """Shapes of all tensors made in the first two steps, in `stats` mode."""
    student, _ = make_student(make_config("stats"), VOCAB_SIZE, (STUDENT_WIDTH, TEACHER_WIDTH))
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
    with NewTensors() as seen:
        _step(student, input_ids)
    return sorted(seen.shapes)


def head_collectives(rank: int) -> dict[str, list[Any]]:
    """The collectives of a step after the first, by exchange."""
    found = {}
    for exchange in ("weight", "stats"):
        student, plugin = make_student(make_config(exchange), VOCAB_SIZE, (STUDENT_WIDTH, TEACHER_WIDTH))
        input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
        _step(student, input_ids)
        models = {"student head": student, "teacher head": plugin.teacher}
        with CollectiveLog({name: local_shard(m.get_output_embeddings()) for name, m in models.items()}) as log:
            _step(student, input_ids)
        found[exchange] = log.calls
    return found


def counting(rank: int) -> dict[str, dict[str, Any]]:
    """By exchange: this rank's loss and collectives in a step whose tokens are counted, and given."""
    found: dict[str, dict[str, Any]] = {}
    for exchange in ("weight", "logits", "stats"):
        student, _ = make_student(make_config(exchange), VOCAB_SIZE, (STUDENT_WIDTH, TEACHER_WIDTH))
        input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
        targets = input_ids.masked_fill(input_ids % 3 == 0, -100)
        items = torch.tensor(int((targets != -100).sum()))
        dist.all_reduce(items)
        _step(student, input_ids)
        found[exchange] = {}
        for name, given in (("counted", {}), ("given", {"num_items_in_batch": int(items)})):
            with CollectiveLog() as log:
                loss = student(input_ids, shift_labels=targets, **given).loss
            found[exchange][name] = float(loss), [call.operation for call in log.calls]
    return found


def rounds(rank: int) -> dict[str, list[str]]:
    """By divergence: the collectives of one more chunk in `stats` mode, sorted."""
    found = {}
    for divergence in ROUNDS:
        student, _ = make_student(make_config("stats", divergence=divergence), 37, (STUDENT_WIDTH, TEACHER_WIDTH))
        calls = []
        for length in (CHUNK, CHUNK, 2 * CHUNK):  # the first compares the ranks' settings
            input_ids = torch.full((1, length), 3)
            with CollectiveLog() as log:
                student(input_ids, shift_labels=input_ids, num_items_in_batch=length)
            calls.append(Counter(call.operation for call in log.calls))
        found[divergence] = sorted((calls[2] - calls[1]).elements())
    return found


def traffic(rank: int) -> dict[str, float]:
    """Bytes received in one step. `stats` has the real rows and `weight` the real heads: each ignores the other."""
    sizes = {
        "weight": (TRAFFIC_VOCAB, TRAFFIC_WIDTH, (1, 8)),
        "stats": (61, TRAFFIC_WIDTH, (TRAFFIC_ROWS // 64, 64)),
        "logits": (LOGITS_VOCAB, LOGITS_WIDTH, (LOGITS_ROWS // 64, 64)),
    }
    found = {}
    for exchange, (head_size, width, shape) in sizes.items():
        student, _ = make_student(make_config(exchange, chunk_size=64), 61, (width, width), head_size)
        input_ids = torch.full(shape, 3 + rank)
        with torch.no_grad():  # once, the ranks compare their settings and cut the teacher's head
            student(input_ids[:1, :2], shift_labels=input_ids[:1, :2], num_items_in_batch=1)
        with Received() as log:
            _step(student, input_ids)
        found[exchange] = log.total
    return found


class Groups(TorchDispatchMode):
    """The ranks of every collective, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.found: dict[str, set[tuple[int, ...]]] = {"forward": set(), "backward": set()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            (group,) = map(dist.ProcessGroup.unbox, groups)
            self.found[self.phase].add(tuple(dist.get_process_group_ranks(group)))
        return func(*args, **(kwargs or {}))


def groups(rank: int) -> dict[str, set[tuple[int, ...]]]:
    """Who takes part in the collectives of a step after the first, in `stats` mode: two copies of two shards."""
    models = [make_model("llama", width, 37, seed=i) for i, width in enumerate((STUDENT_WIDTH, TEACHER_WIDTH))]
    kd.attach(*models, make_config("stats"))
    mesh = fsdp_units.make_mesh("cpu", 4, shard_size=2)
    fsdp_units.shard_student(models[0], mesh, dtype=torch.float32)
    fsdp_units.shard_teacher(models[1], mesh)
    input_ids = torch.full((1, 9), 3)
    _step(models[0], input_ids)
    with Groups() as log:
        loss = models[0](input_ids, shift_labels=input_ids, num_items_in_batch=36).loss
        log.phase = "backward"
        loss.backward()
    return log.found


AUTOMATIC = ("sharded", "replicated", "tied", "frozen", "groups", "student tied", "ddp", "fsdp1")


def automatic(rank: int) -> dict[str, list[str]]:
    """By layout: the mode that `auto` takes on this rank, and what rank 0 says about it."""
    return {name: _automatic(name) for name in AUTOMATIC}


def automatic_zero3(rank: int) -> dict[str, list[str]]:
    """The same for two ZeRO-3 engines."""
    return {"zero3": _automatic("zero3")}


def outside_zero3(rank: int) -> str:
    """What the loss says of the weight of a ZeRO-3 engine's head, used past its forward."""
    student, teacher = (make_model("llama", STUDENT_WIDTH, VOCAB_SIZE, seed=i) for i in range(2))
    _wrapped("zero3", student, teacher)
    hidden, targets = torch.randn(5, STUDENT_WIDTH), torch.full((5,), 3)
    heads = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    try:
        kd.distill_loss(hidden, heads[0], hidden, heads[1], targets, config=make_config("weight"))
    except ValueError as error:
        return str(error)
    return "accepted"


def _automatic(name: str) -> list[str]:
    widths = enumerate((STUDENT_WIDTH, TEACHER_WIDTH))
    student, teacher = (make_model("llama", width, VOCAB_SIZE, seed=i) for i, width in widths)
    for side, model in (("tied", teacher), ("student tied", student)):
        if name == side:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    student.get_output_embeddings().requires_grad_(name != "frozen")
    plugin = kd.attach(student, teacher, make_config("auto"))
    model, plugin.teacher = _wrapped(name, student, teacher)
    log, handler = logging.getLogger("kd_plugin.exchange.mode"), Messages()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with torch.no_grad():  # an evaluation, of other sizes
        model(torch.full((1, 2), 3), shift_labels=torch.full((1, 2), 3), num_items_in_batch=1)
    assert plugin.exchange.mode is None
    input_ids = torch.full((2, AUTO_ROWS[name in FEWER_ROWS] // 2), 3)
    model(input_ids, shift_labels=input_ids, num_items_in_batch=input_ids.numel())
    log.removeHandler(handler)
    return [str(plugin.exchange.mode), *handler.found]


def _wrapped(name: str, student: nn.Module, teacher: nn.Module) -> tuple[Any, Any]:
    """What to call for each."""
    ranks = dist.get_world_size()
    mesh = fsdp_units.make_mesh("cpu", ranks, shard_size=2 if name == "groups" else ranks)
    if name == "zero3":
        import deepspeed

        block: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        block["zero_allow_untested_optimizer"] = True
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        engines = [deepspeed.initialize(model=student, optimizer=optimizer, config=block)[0]]
        engines.append(
            deepspeed.initialize(model=teacher, config=zero_block.teacher_config(block, precision="float32"))[0]
        )
        return tuple(engines)
    if name == "fsdp1":
        cpu = torch.device("cpu")
        wrapped = fsdp1_units.wrap_student(student, mesh, cpu, dtype=torch.float32)
        return wrapped, fsdp1_units.wrap_teacher(teacher, mesh, cpu)
    if name != "replicated":
        fsdp_units.shard_teacher(teacher, mesh)
    if name == "ddp":
        return DistributedDataParallel(student), teacher
    fsdp_units.shard_student(student, mesh, dtype=torch.float32)
    return student, teacher


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


UNITS = ("head", "fsdp2 root", "fsdp1")  # the gather of the latter two comes before the student's forward


def mismatch(rank: int) -> dict[tuple[str, str], tuple[str, float]]:
    """By planted difference on the last rank, and unit of the head: message and seconds."""
    last = rank == dist.get_world_size() - 1
    plants: dict[str, dict[str, Any]] = {
        "exchange": {"exchange": "weight" if last else "stats"},
        "chunk_size": {"exchange": "stats", "chunk_size": 9 if last else 8},
        "divergence": {"exchange": "stats", "divergence": "jsd" if last else "forward_kl"},
        "student vocabulary, stats": {"exchange": "stats", "size": 41 if last else 37},
        "student vocabulary, weight": {"exchange": "weight", "size": 41 if last else 37},
        "metrics": {"exchange": "stats", "metrics": not last},
        "loss_memory_mb": {"exchange": "stats", "chunk_size": "auto", "loss_memory_mb": 1.0 if last else 2.0},
        "student width": {"exchange": "stats", "widths": (32 if last else 16, 24)},
        "teacher width": {"exchange": "stats", "widths": (16, 32 if last else 24)},
        "teacher vocabulary, stats": {"exchange": "stats", "teacher_size": 41 if last else 37},
        "teacher vocabulary, weight": {"exchange": "weight", "teacher_size": 41 if last else 37},
        "dtype": {"exchange": "stats", "dtype": torch.float64 if last else torch.float32},
    }
    return {(name, unit): _refused(unit, **plant) for unit in UNITS for name, plant in plants.items()}


def _refused(
    unit: str,
    *,
    size: int = 37,
    teacher_size: int = 37,
    widths: tuple[int, int] = (16, 24),
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[str, float]:
    """What the first step says, and after how many seconds."""
    student, teacher = (
        make_model("llama", width, vocab_size, seed=0).to(dtype)
        for width, vocab_size in zip(widths, (size, teacher_size), strict=True)
    )
    kd.attach(student, teacher, make_config(**settings))
    if unit == "head":
        shard_head(student)
        shard_head(teacher)
    elif unit == "fsdp2 root":
        fully_shard(student)
    else:
        student = FullyShardedDataParallel(student, use_orig_params=True, device_id=torch.device("cpu"))
    start = time.perf_counter()
    try:
        _step(student, torch.full((1, 6), 3))
        message = "accepted"
    except ValueError as error:
        message = str(error)
    seconds = time.perf_counter() - start
    dist.barrier()
    return message, seconds


def hooks(rank: int) -> dict[str, int]:
    """By wrapper: global hooks of `attach` that are left after a first step, which follows one rank's own forward."""
    everywhere, found = torch.nn.modules.module._global_forward_pre_hooks, {}
    for name in ("ddp", "copies", "fsdp2 root"):
        before = set(everywhere)
        student, teacher = (make_model("llama", STUDENT_WIDTH, 37, seed=i) for i in range(2))
        plugin = kd.attach(student, teacher, make_config("weight"))
        model = student
        if name == "ddp":
            model = DistributedDataParallel(student)
        elif name == "copies":  # FSDP2 units that gather nothing
            mesh = fsdp_units.make_mesh("cpu", dist.get_world_size(), replicate=True)
            fsdp_units.shard_student(student, mesh, dtype=torch.float32)
        else:
            fully_shard(student)
        if rank == 0 and name != "fsdp2 root":
            with torch.no_grad():
                student(torch.full((1, 6), 3))
        dist.barrier()  # fails if rank 0 is in another collective
        _step(model, torch.full((1, 6), 3))
        found[name] = len(set(everywhere) - before)
        plugin.detach()
    return found


def agreement(rank: int) -> dict[str, list[Tensor]]:
    """In fp64, by mode: this rank's loss, and the whole gradient of the student's head."""
    found = {}
    for mode in ("weight", "logits", "stats"):
        models = [make_model("llama", width, VOCAB_SIZE, seed=i).double() for i, width in enumerate((16, 24))]
        kd.attach(*models, make_config(mode))
        for model in models:
            shard_head(model)
        input_ids = torch.randint(3, VOCAB_SIZE, (2, 11 + rank), generator=torch.Generator().manual_seed(rank))
        loss = models[0](input_ids, shift_labels=input_ids, num_items_in_batch=50).loss
        loss.backward()
        found[mode] = [loss.detach(), models[0].get_output_embeddings().weight.grad.full_tensor()]
    return found


def compiled(rank: int) -> dict[str, tuple[float, float]]:
    """By what is compiled, and around what: this rank's loss, and that of the same student left as it is."""
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(rank))

    def loss_of(wrap: Callable[[Any], Any], *, before: bool = False, teacher_too: bool = False) -> float:
        torch._dynamo.reset()
        student, teacher = (make_model("llama", width, VOCAB_SIZE, seed=i) for i, width in enumerate((16, 24)))
        if before:
            student = torch.compile(student, backend="eager")
        teacher = torch.compile(teacher, backend="eager") if teacher_too else teacher
        kd.attach(student, teacher, make_config("weight"))
        model = wrap(student)  # kept: a DDP wrapper that is gone before backward reduces nothing
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        return loss.item()

    def compile_in_place(student: Any) -> Any:
        student.compile(backend="eager")
        return DistributedDataParallel(student)

    plain = loss_of(DistributedDataParallel)
    found = {
        "alone": loss_of(lambda student: torch.compile(student, backend="eager")),
        "in place": loss_of(compile_in_place),
        "in DDP": loss_of(lambda student: DistributedDataParallel(torch.compile(student, backend="eager"))),
        "around DDP": loss_of(lambda student: torch.compile(DistributedDataParallel(student), backend="eager")),
        "before attach": loss_of(DistributedDataParallel, before=True),
        "the teacher, too": loss_of(DistributedDataParallel, before=True, teacher_too=True),
    }
    return {name: (loss, plain) for name, loss in found.items()}


def following_teacher(rank: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """In fp64, by mode and by what is written to between steps of whole models: (loss, that in mode `weight`)."""

    def write_head(teacher: Any) -> None:  # as a moving average of the student's weights does
        with torch.no_grad():
            teacher.get_output_embeddings().weight.mul_(1.5)

    def load(teacher: Any) -> None:
        teacher.load_state_dict({name: 1.5 * value for name, value in teacher.state_dict().items()})

    def cap(teacher: Any) -> None:
        teacher.config.final_logit_softcapping = 2.0

    input_ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(rank))
    found: dict[tuple[str, str], list[float]] = {}
    for change in (write_head, load, cap):
        for mode in ("weight", "logits", "stats"):
            models = [make_model("gemma2", width, VOCAB_SIZE, seed=i).double() for i, width in enumerate((16, 24))]
            kd.attach(*models, make_config(mode))
            losses = found[change.__name__, mode] = []
            for _ in range(3):
                losses.append(models[0](input_ids, shift_labels=input_ids, num_items_in_batch=44).loss.item())
                change(models[1])
    return {
        (change, mode): list(zip(losses, found[change, "weight"], strict=True))
        for (change, mode), losses in found.items()
    }


SMALLER_TEACHERS = (17, 31)  # of the student's 37 ids; with 17, rank 1 of two has none of them
LARGER: dict[str, dict[str, Any]] = {
    "all parts": {"divergence": "jsd", "label_smoothing": 0.1, "z_loss_weight": 0.02},
    "temperature 1": {"divergence": "reverse_kl", "temperature": 1.0},
    "soft only": {"divergence": "tvd", "hard_weight": 0.0},
    "soft only, no metrics": {"hard_weight": 0.0, "metrics": False},
    "hard only": {"soft_weight": 0.0},
}


def larger_student(rank: int) -> dict[tuple[str, int, str], tuple[float, Tensor, dict[str, float]]]:
    """In fp64, by objective, the teacher's size and mode: this rank's loss, the head's gradient, what is measured."""
    found = {}
    for name, settings in LARGER.items():
        for size in SMALLER_TEACHERS:
            for mode in ("weight", "logits", "stats"):
                models = [make_model("llama", width, n, seed=n).double() for width, n in ((16, 37), (24, size))]
                plugin = kd.attach(*models, make_config(mode, **settings))
                for model in models:
                    shard_head(model)
                generator = torch.Generator().manual_seed(rank)
                ids, labels = torch.randint(37, (2, 2, 11 + rank), generator=generator)
                loss = models[0](ids % size, shift_labels=labels, num_items_in_batch=50).loss
                loss.backward()
                gradient = models[0].get_output_embeddings().weight.grad.full_tensor()
                measured = {k: v for k, v in plugin.metrics().items() if not k.endswith("_ms") and "peak" not in k}
                found[name, size, mode] = loss.item(), gradient, measured
    return found


def tensor_parallel(rank: int) -> dict[str, float]:
    """Largest error of loss and gradients with a teacher's logits in slices, fp64, by how they are cut."""
    ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # the same rows on every rank
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (11, 37))
    targets = torch.randint(30, (11,), generator=generator)
    targets[[2, 7]] = -100
    found = {}
    for size in (30, 41):  # fewer token ids than the student's, and more
        logits = torch.randn(11, size, generator=generator, dtype=torch.float64)
        even = [size // ranks + (r < size % ranks) for r in range(ranks)]
        for name, widths in {"even": even, "one": [size - ranks + 1] + [1] * (ranks - 1), "empty": [size]}.items():
            widths = widths + [0] * (ranks - len(widths))
            head = nn.Linear(16, 37, bias=False, dtype=torch.float64)
            head.weight.data.copy_(weight)
            head = kd.DistillHead(head, make_config("weight", chunk_size=4))
            own = logits.split(widths, dim=1)[rank]
            x, y = (hidden.clone().requires_grad_(True) for _ in range(2))
            given = {} if name == "even" else {"widths": widths}
            ours = head(x, targets, teacher=kd.ShardedLogits(own, **given)).loss
            dense_weight = weight.clone().requires_grad_(True)
            config = make_config("weight")
            dense = kd.reference.distill_logits(y @ dense_weight.T, logits, targets, config=config).loss
            pairs = [(ours, dense)]
            pairs += zip(
                torch.autograd.grad(ours, (x, head.weight)), torch.autograd.grad(dense, (y, dense_weight)), strict=True
            )
            found[f"{name}, {size}"] = max(float((one - other).abs().max()) for one, other in pairs)
    return found
