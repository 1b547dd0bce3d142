"""Names of torch that another release may lack: what is then said, or done without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils import _python_dispatch

from kd_plugin.distributed import torch_internals
from kd_plugin.distributed.collectives import end_process_groups, host_device
from kd_plugin.distributed.torch_internals import TESTED_TORCH, UnsupportedTorch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class Unit:
    """FSDP2's way to its policy of mixed precision."""

    class _State:
        pass

    def _get_fsdp_state(self) -> Unit._State:
        return Unit._State()


class Numberless:
    """A tensor whose storage has no number."""

    def untyped_storage(self) -> object:
        return object()


def count(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


@pytest.fixture
def group() -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    end_process_groups()


# -- names without which kd_plugin cannot go on -------------------------------------------------------------------

NEEDED: dict[str, tuple[list[tuple[object, str]], Callable[[], object]]] = {
    "torch._assert_async": (
        [(torch, "_assert_async")],
        lambda: torch_internals.assert_on_device(torch.tensor(True), "never"),
    ),
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass": (
        [(_python_dispatch, "is_traceable_wrapper_subclass")],
        lambda: torch_internals.is_wrapper_subclass(torch.zeros(1)),
    ),
    "torch.UntypedStorage._cdata": (
        [],
        lambda: torch_internals.storage_id(Numberless()),
    ),
    "torch.distributed.all_gather_single": (
        [(dist, "all_gather_single"), (dist, "all_gather_into_tensor")],
        torch_internals.gather_into,
    ),
    "torch.distributed.reduce_scatter_single": (
        [(dist, "reduce_scatter_single"), (dist, "reduce_scatter_tensor")],
        torch_internals.reduce_scatter_into,
    ),
    "torch.distributed.set_timeout": (
        [(dist, "set_timeout"), (distributed_c10d, "_set_pg_timeout")],
        lambda: torch_internals.set_timeout(timedelta(seconds=1), None),
    ),
    "FSDPModule._get_fsdp_state": ([], lambda: torch_internals.fsdp2_compute_dtype(nn.Linear(1, 1))),
    "FSDPState._mp_policy": ([], lambda: torch_internals.fsdp2_compute_dtype(Unit())),
    "torch._dynamo.config.patch": (
        [(torch._dynamo, "config")],
        torch_internals.floats_as_constants,
    ),
    "torch._dynamo.maybe_mark_dynamic": (
        [(torch._dynamo, "maybe_mark_dynamic")],
        lambda: torch_internals.mark_dim_dynamic(torch.zeros(2), 0),
    ),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_name_that_is_missing_is_said_with_both_releases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, use = NEEDED[name]
    for owner, attribute in missing:
        monkeypatch.delattr(owner, attribute, raising=False)
    with pytest.raises(UnsupportedTorch) as caught:
        use()
    message = str(caught.value)
    assert re.search(rf"torch {re.escape(torch.__version__)} .* has no {re.escape(name)},", message)
    assert f"tested with torch {TESTED_TORCH}" in message


# -- names that can be done without -------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner", "name"), [(torch._C, "_autograd"), (None, "_get_current_graph_task_keep_graph")])
def test_saved_tensors_are_kept_where_autograd_does_not_say(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch._C._autograd if owner is None else owner, name)
    assert torch_internals.graph_is_kept()


@pytest.mark.parametrize("kept", [True, False])
def test_autograd_says_whether_its_graph_is_kept(kept: bool) -> None:
    said = []
    x = torch.ones((), requires_grad=True)
    y = x * 1
    y.register_hook(lambda gradient: said.append(torch_internals.graph_is_kept()))
    y.backward(retain_graph=kept)
    assert said == [kept]


def test_without_the_class_nothing_is_an_awaited_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    made = dist._functional_collectives.AsyncCollectiveTensor(torch.zeros(1))
    assert torch_internals.is_awaited_collective(made)
    assert not torch_internals.is_awaited_collective(torch.zeros(1))
    monkeypatch.delattr(dist, "_functional_collectives")
    assert not torch_internals.is_awaited_collective(made)


def test_numbers_are_compared_on_their_device_where_a_group_does_not_say_what_it_reaches(group: None) -> None:
    silent = object()
    assert host_device(None, torch.device("meta")) == CPU
    assert host_device(silent, torch.device("meta")) == torch.device("meta")  # type: ignore[arg-type]


def test_the_older_names_of_collectives_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_gather_single", "reduce_scatter_single"):
        monkeypatch.delattr(dist, name, raising=False)
    assert torch_internals.gather_into() is dist.all_gather_into_tensor
    assert torch_internals.reduce_scatter_into() is dist.reduce_scatter_tensor


def test_the_public_name_of_the_timeout_goes_before_the_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(dist, "set_timeout", lambda *given: called.append(given), raising=False)
    monkeypatch.setattr(distributed_c10d, "_set_pg_timeout", lambda *given: pytest.fail("deprecated"))
    torch_internals.set_timeout(timedelta(seconds=3), None)
    assert called == [(timedelta(seconds=3), None)]


@pytest.mark.parametrize("error", [ValueError("not in the group"), RuntimeError("no timeout in this backend")])
def test_a_group_that_takes_no_timeout_stays_as_it_is(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(dist, "set_timeout", refuse, raising=False)
    torch_internals.set_timeout(timedelta(seconds=3), None)


def test_the_default_group_is_known_where_torch_lists_none(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_internals.process_groups() == [dist.group.WORLD]
    monkeypatch.delattr(distributed_c10d, "_world")
    assert torch_internals.process_groups() == [None]


def test_nobody_is_warned_where_ddp_does_not_say_that_it_runs(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    assert torch_internals.runs_outside_ddp(ddp)
    monkeypatch.setattr(ddp, "_use_python_reducer", True)
    assert not torch_internals.runs_outside_ddp(ddp)
    monkeypatch.undo()
    monkeypatch.delattr(type(ddp), "_get_active_ddp_module")
    assert not torch_internals.runs_outside_ddp(ddp)


def test_a_compiled_module_has_its_original() -> None:
    module = nn.Linear(1, 1)
    assert torch_internals.original_of_compiled(torch.compile(module)) is module
    assert torch_internals.original_of_compiled(module) is None
    assert torch_internals.original_of_compiled(object()) is None


def test_torch_compile_is_asked_for_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def compile_(body: object, *, isolate_recompiles: bool = False, **options: object) -> object:
        given.update(options, isolate_recompiles=isolate_recompiles)
        return body

    monkeypatch.setattr(torch, "compile", compile_)
    assert torch_internals.compiled_alone(count, max_graphs=5) is count
    assert given["isolate_recompiles"] is True
    assert given["recompile_limit"] == 5


def test_a_torch_without_it_has_a_cache_for_each_code_and_the_limit_around_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve sizes of each of two kernels with the same body are compiled; torch's own limit allows eight together."""
    original, graphs = torch.compile, []

    def compile_(body: Callable[..., Tensor], *, fullgraph: bool, options: object) -> Callable[..., Tensor]:
        def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        return original(body, fullgraph=fullgraph, backend=backend, dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_)
    with torch._dynamo.config.patch(recompile_limit=8):
        kernels = [torch_internals.compiled_alone(partial(torch.mul, factor), max_graphs=12) for factor in (2, 3)]
        for size in range(2, 14):
            for kernel, factor in zip(kernels, (2, 3), strict=True):
                assert torch.equal(kernel(torch.ones(size)), torch.full((size,), float(factor)))
        assert len(graphs) == 24
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            kernels[0](torch.ones(14))


# -- the rule -----------------------------------------------------------------------------------------------------

# Attributes of every nn.Module and Tensor, on which the libraries around torch rely, too.
OF_MODULES = {"_buffers", "_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_version", "_call_impl"}
OF_OTHERS = {"_attn_implementation", "_exit", "_from_config", "_getframe", "_replace"}  # not torch's


def sources() -> dict[Path, ast.Module]:
    files = sorted((ROOT / "kd_plugin").rglob("*.py"))
    return {file: ast.parse(file.read_text()) for file in files if file.name != "torch_internals.py"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that kd_plugin's classes define."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    return names | {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private attributes of anything but `self` and `cls`, private modules and names imported, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom | ast.Import):
            path = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in [*path.split("."), *(part for alias in node.names for part in alias.name.split("."))]:
                if is_private(name):
                    yield node.lineno, name
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value):
                yield node.lineno, name.value


# By getattr: accelerate's hook, transformers' list of layers, and its mark of an adapter
OF_LIBRARIES = {"_hf_hook", "_no_split_modules", "_hf_peft_config_loaded"}


def test_no_other_module_uses_private_names_of_torch() -> None:
    trees = sources()
    known = OF_MODULES | OF_OTHERS | OF_LIBRARIES | own_names(list(trees.values()))
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file, tree in trees.items()
        for line, name in private_names(tree)
        if name not in known
    ]
    assert not found


def test_the_rule_sees_each_way_to_a_private_name() -> None:
    text = "import torch._C\nfrom torch import _dynamo\ntorch._ops\ngetattr(group, '_device_types')\nself._own"
    assert [name for _, name in private_names(ast.parse(text))] == ["_C", "_dynamo", "_ops", "_device_types"]


def test_the_tested_release_is_the_one_that_is_installed_for_tests() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(rf"^torch=={re.escape(TESTED_TORCH)}\.", constraints, re.MULTILINE)
