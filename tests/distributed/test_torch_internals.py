"""Names of torch that another release may lack: what is then said, or done without them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils import _python_dispatch

from kd_plugin.distributed import compiler_internals, torch_internals
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


class Silent:
    """A tensor whose storage has no number, whose writes are not counted, and whose gradient does not say its cut."""

    grad_fn = SimpleNamespace(name=lambda: "_ToTorchTensorBackward")

    def untyped_storage(self) -> object:
        return object()

    def is_inference(self) -> bool:
        return False


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
        lambda: torch_internals.storage_id(Silent()),
    ),
    "torch.Tensor._version": ([], lambda: torch_internals.times_written(Silent())),
    "dtensor_spec on the gradient of DTensor.full_tensor()": ([], lambda: torch_internals.cut_of_gradient(Silent())),
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
        compiler_internals.floats_as_constants,
    ),
    "torch._dynamo.maybe_mark_dynamic": (
        [(torch._dynamo, "maybe_mark_dynamic")],
        lambda: compiler_internals.mark_dim_dynamic(torch.zeros(2), 0),
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
    assert f"tested with torch {TESTED_TORCH[0]} to {TESTED_TORCH[1]}:" in message


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


def test_writes_in_place_are_counted_where_tensors_count_them() -> None:
    tensor = torch.zeros(2)
    before = torch_internals.times_written(tensor)
    tensor.add_(1)
    assert torch_internals.times_written(tensor) == before + 1
    with torch.inference_mode():
        uncounted = torch.zeros(2)
        uncounted.add_(1)
    assert torch_internals.times_written(uncounted) == 0


def test_the_call_of_a_module_is_replaced_and_given_back() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    own = torch_internals.whole_call(module)
    torch_internals.replace_whole_call(module, lambda given: -own(given))
    assert torch.equal(module(x), -own(x))
    torch_internals.restore_whole_call(module, print)
    assert torch.equal(module(x), -own(x)), "another's is left alone"
    torch_internals.restore_whole_call(module, module.__dict__["_call_impl"])
    assert torch.equal(module(x), own(x))


def test_a_module_keeps_its_call_where_torch_has_another_name_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2)
    monkeypatch.delattr(nn.Module, "_call_impl")
    torch_internals.replace_whole_call(module, lambda given: given)
    assert "_call_impl" not in module.__dict__


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
    assert compiler_internals.original_of_compiled(torch.compile(module)) is module
    assert compiler_internals.original_of_compiled(module) is None
    assert compiler_internals.original_of_compiled(object()) is None


def test_torch_compile_is_asked_for_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def compile_(body: object, *, isolate_recompiles: bool = False, **options: object) -> object:
        given.update(options, isolate_recompiles=isolate_recompiles)
        return body

    monkeypatch.setattr(torch, "compile", compile_)
    assert compiler_internals.compiled_alone(count, max_graphs=5, dynamic=True) is count
    assert given["dynamic"] is True
    assert given["isolate_recompiles"] is True
    assert given["recompile_limit"] == 5


def test_a_torch_without_it_has_a_cache_for_each_code_and_the_limit_around_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve sizes of each of two kernels with the same body are compiled; torch's own limit allows eight together."""
    original, graphs = torch.compile, []

    def compile_(body: Callable[..., Tensor], *, fullgraph: bool) -> Callable[..., Tensor]:
        def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        return original(body, fullgraph=fullgraph, backend=backend, dynamic=False)

    monkeypatch.setattr(torch, "compile", compile_)
    with torch._dynamo.config.patch(recompile_limit=8):
        kernels = [
            compiler_internals.compiled_alone(partial(torch.mul, factor), max_graphs=12, fullgraph=True)
            for factor in (2, 3)
        ]
        for size in range(2, 14):
            for kernel, factor in zip(kernels, (2, 3), strict=True):
                assert torch.equal(kernel(torch.ones(size)), torch.full((size,), float(factor)))
        assert len(graphs) == 24
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            kernels[0](torch.ones(14))


def test_sizes_that_were_equal_by_chance_have_no_graph_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_graphs() -> int:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        run = compiler_internals.compiled_alone(count, max_graphs=4, backend=backend, dynamic=True)
        for size in (5, 6):
            assert torch.equal(run(torch.zeros(5, size)), torch.ones(5, size))
        return len(graphs)

    with compiler_internals.equal_sizes_may_differ():
        assert num_graphs() == 1
    with monkeypatch.context() as patched:
        patched.setattr(torch.fx.experimental, "_config", SimpleNamespace())
        untold = compiler_internals.equal_sizes_may_differ()  # of a torch that cannot be told so
    with untold:
        assert num_graphs() == 2


def test_the_tested_releases_begin_with_the_oldest_allowed_and_have_the_one_installed_for_tests() -> None:
    first, last = TESTED_TORCH
    assert f'"torch>={first}",' in (ROOT / "pyproject.toml").read_text()
    installed = re.search(r"^torch==2\.(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert installed and int(first.removeprefix("2.")) <= int(installed[1]) <= int(last.removeprefix("2."))
