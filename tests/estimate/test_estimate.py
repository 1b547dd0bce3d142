"""`kd-plugin estimate`: figures from configurations alone, and what is said about them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from kd_plugin.cli.commands import app
from kd_plugin.estimate.account import Estimate, estimate
from kd_plugin.estimate.memory import memory
from kd_plugin.estimate.tables import notes_of
from kd_plugin.estimate.wire import settled
from kd_plugin.exchange.cost import Head, logits_bytes, stats_bytes, weight_bytes
from kd_plugin.row_kernels.blocks import block_rows
from kd_plugin.settings.run import DistillConfig, RunConfig
from kd_plugin.settings.yaml_file import to_yaml
from tests.round_speeds import SPEEDS
from tests.tiny_runs import make_folder, run_config

QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
SMALL = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
LARGE = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of Qwen3-1.7B and Qwen3-8B; no weights."""
    from transformers import Qwen3Config

    path = tmp_path_factory.mktemp("qwen")
    Qwen3Config(**QWEN, **SMALL, tie_word_embeddings=True).save_pretrained(path / "student")
    Qwen3Config(**QWEN, **LARGE, tie_word_embeddings=False).save_pretrained(path / "teacher")
    return path


def qwen_config(folder: Path, **train: object) -> RunConfig:
    models = {name: {"model": str(folder / name)} for name in ("student", "teacher")}
    return RunConfig.model_validate(
        {**models, "data": {"seq_len": 2048}, "train": {"activation_checkpointing": True, **train}}
    )


def lines(estimated: Estimate) -> dict[str, float]:
    return {line.name: line.num_bytes for line in estimated.memory.lasting}


def command(folder: Path, *arguments: str, **sections: object) -> Result:
    path = folder / "estimated.yaml"
    path.write_text(to_yaml(run_config(folder, **sections)), encoding="utf-8")
    return CliRunner().invoke(app, ["estimate", str(path), *arguments], prog_name="kd-plugin")


QWEN_HEADS = Head(151936, 2048, 8, item_bytes=2, reduced_bytes=2), Head(151936, 4096, 8, item_bytes=2)


def test_published_volumes_of_qwen3_at_eight_ranks() -> None:
    """W 8, n 2048, 1.7B from 8B, bf16; the logits' volume there is for logits in bf16, ours travel in fp32."""
    ranks, rows, vocab = 8, 2048, 151936
    assert weight_bytes(*QWEN_HEADS) / 1e6 == pytest.approx(2178, abs=1)
    assert stats_bytes(*QWEN_HEADS, rows, ranks=ranks) / 1e6 == pytest.approx(294, rel=0.02)
    narrower = 2 * rows * vocab * (ranks - 1) / ranks
    assert (logits_bytes(*QWEN_HEADS, rows, ranks=ranks) - narrower) / 1e6 == pytest.approx(1751, abs=1)


def test_zero3_moves_the_heads_as_the_formula_says(qwen: Path) -> None:
    estimated = estimate(qwen_config(qwen, parallel="deepspeed"), world_size=8)
    assert estimated.exchanges["weight"].num_bytes / 1e6 == pytest.approx(2178, abs=1)
    alone = stats_bytes(*QWEN_HEADS, 2048, ranks=8)
    assert estimated.exchanges["stats"].num_bytes > alone, "the student's head still moves"


def test_fsdp_reduces_the_heads_gradient_in_fp32(qwen: Path) -> None:
    estimated = estimate(qwen_config(qwen, parallel="fsdp"), world_size=8)
    more = estimated.exchanges["weight"].num_bytes - weight_bytes(*QWEN_HEADS)
    assert more == pytest.approx(7 / 8 * 151936 * 2048 * 2)


def test_sizes_of_real_models_come_from_their_configurations(qwen: Path) -> None:
    setup = estimate(qwen_config(qwen), world_size=1).setup
    assert setup.student.numel == pytest.approx(1.72e9, rel=0.01)
    assert setup.teacher is not None
    assert setup.teacher.numel == pytest.approx(8.19e9, rel=0.01)
    assert (setup.student.tied, setup.teacher.tied) == (True, False)


@pytest.mark.parametrize("world_size", [2, 8, 4096])
def test_fsdp_shards_are_whole_rows(folder: Path, world_size: int) -> None:
    """At 4096 ranks rank 0 still has one row of each matrix, which is more than 1 / W of it."""
    from transformers import AutoModelForCausalLM

    config = run_config(folder, train={"parallel": "fsdp", "tokens_per_step": None})
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    rows = {name: -(-p.shape[0] // world_size) * p[0].numel() for name, p in model.named_parameters()}
    held = lines(estimate(config, world_size=world_size))
    assert held["teacher"] == 4 * sum(rows.values())
    half = sum(count for name, count in rows.items() if ".2." not in name and ".3." not in name)
    assert held["student parameters"] == 4 * half
    assert held["AdamW"] == 2 * held["student gradients"] == 8 * half


def test_what_stays_shrinks_from_zero1_to_zero3(qwen: Path) -> None:
    held = []
    for stage in (1, 2, 3):
        config = qwen_config(qwen, parallel="deepspeed")
        config = config.model_copy(update={"deepspeed": {"zero_optimization": {"stage": stage}}})
        estimated = estimate(config, world_size=64)
        held.append(estimated.memory.lasting_bytes)
        assert lines(estimated)["AdamW"] == pytest.approx(8 * estimated.setup.student.numel / 64, rel=1e-6)
    assert held[0] > held[1] > held[2]


def test_activations_are_those_that_autograd_keeps(folder: Path) -> None:
    """Of the real student on the CPU, whose attention keeps a little more or less than the fused one counted."""
    from transformers import AutoModelForCausalLM

    config = run_config(folder, data={"packing": "joined"})
    teacher = estimate(config, device="cpu", speeds=SPEEDS).setup.teacher
    assert teacher is not None and teacher.activations is not None
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.base_model(torch.zeros(2, 32, dtype=torch.int64), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert out.last_hidden_state.requires_grad
    assert sum(teacher.activations.layers) + teacher.activations.outside == pytest.approx(real, rel=0.1)


def test_checkpointing_keeps_layer_inputs_only(qwen: Path) -> None:
    peaks = {
        on: estimate(qwen_config(qwen, activation_checkpointing=on), world_size=1).memory.phase_bytes("loss")
        for on in (False, True)
    }
    assert peaks[True] < peaks[False] / 2


def test_stats_keeps_rows_of_the_heads(folder: Path) -> None:
    config = run_config(folder, train={"parallel": "fsdp"}, distill={"chunk_size": 8})
    setup = estimate(config, world_size=4).setup
    by_mode = {name: memory(replace(setup, exchange=name)) for name in ("weight", "stats")}
    names = {name: {line.name for line in each.phases["loss"]} for name, each in by_mode.items()}
    assert {"student head, whole", "teacher head, whole"} <= names["weight"]
    assert not {"student head, whole", "teacher head, whole"} & names["stats"]
    assert by_mode["stats"].phase_bytes("loss") < by_mode["weight"].phase_bytes("loss")


def test_the_choice_is_the_fastest_that_fits(qwen: Path) -> None:
    """FSDP's gathers hide behind the models, and its optimizer has an eighth of the work."""
    config = qwen_config(qwen, parallel="fsdp", gradient_accumulation_steps=4)
    roomy = estimate(config, world_size=8, gpu_memory_gib=80)
    assert roomy.chosen is not None
    assert (roomy.chosen.mode, roomy.chosen.teacher_sharded) == ("fsdp", False)
    fewest = min(roomy.choices, key=lambda choice: choice.step_bytes)
    assert fewest.mode == "ddp" and fewest.step_seconds is not None and roomy.chosen.step_seconds is not None
    assert fewest.fits and roomy.chosen.step_seconds < 0.99 * fewest.step_seconds
    tight = estimate(config, world_size=8, gpu_memory_gib=16)
    assert tight.chosen is not None
    assert tight.chosen.peak_bytes <= 0.9 * 16 * 2**30 < roomy.chosen.peak_bytes
    assert estimate(config, world_size=8, gpu_memory_gib=1).chosen is None


def test_a_frozen_head_has_no_gradient(folder: Path) -> None:
    config = run_config(folder, student={"freeze": ["lm_head"]}, train={"parallel": "fsdp"})
    estimated = estimate(config, world_size=2)
    assert "dW" not in {line.name for line in estimated.memory.phases["loss"]}
    often = 1 / estimated.setup.accumulation  # both are gathered once per step
    assert estimated.exchanges["weight"].num_bytes == pytest.approx(0.5 * 64 * 32 * 4 * 2 * often)
    kept = [line.num_bytes for line in estimated.memory.phases["layers' backward"] if line.name == "student head, kept"]
    assert kept == [64 * 32 * 4]


def test_groups_of_shards_hold_more_and_gather_less(folder: Path) -> None:
    def at(shard_size: int | None, **more: object) -> Estimate:
        train = {"parallel": "fsdp", "tokens_per_step": None, "gradient_accumulation_steps": 3}
        return estimate(run_config(folder, train={**train, "shard_size": shard_size}, **more), world_size=8)

    flat, grouped = at(None), at(2)
    assert lines(grouped)["student gradients"] == pytest.approx(4 * lines(flat)["student gradients"])
    assert lines(grouped)["teacher"] == pytest.approx(4 * lines(flat)["teacher"])
    ratio = {name: volume.num_bytes / flat.exchanges[name].num_bytes for name, volume in grouped.exchanges.items()}
    assert ratio["weight"] == pytest.approx((1 / 2) / (7 / 8))
    assert ratio["stats"] < 1 / 7, "1 other rank, not 7"
    trained = flat.setup.student.trainable
    each = {name: at(2, distill={"exchange": name}) for name in ("weight", "stats")}
    between = {name: traffic(estimated)["gradients between copies"] for name, estimated in each.items()}
    assert between["weight"] == pytest.approx(2 * 3 / 4 * trained / 2 * 4), "once per step"
    assert between["stats"] - between["weight"] == pytest.approx(2 * 2 * 3 / 4 * 64 * 32 / 2 * 4), "the head's: thrice"
    assert "gradients between copies" not in traffic(flat)
    assert {(choice.mode, choice.shard_ranks) for choice in grouped.choices} == {("ddp", 2), ("fsdp", 2), ("fsdp", 8)}
    many = estimate(flat.setup.config, world_size=4096)
    assert {(choice.mode, choice.shard_ranks) for choice in many.choices} == {
        ("ddp", 4096),
        ("fsdp", 8),
        ("fsdp", 4096),
    }
    whole = at(1)
    assert (whole.setup.mode, whole.setup.teacher_sharded) == ("ddp", False)


def traffic(estimated: Estimate) -> dict[str, float]:
    return {line.name: line.num_bytes for line in estimated.parameters}


@pytest.mark.parametrize("sharding", ["shard", "replicate"])
def test_an_offloaded_teacher_is_on_the_gpu_layer_by_layer(qwen: Path, sharding: str) -> None:
    config = qwen_config(qwen, parallel="fsdp").model_copy(update={"distill": DistillConfig(exchange="weight")})
    plain, offloaded = (
        estimate(config.model_copy(update={"teacher": config.teacher.model_copy(update=update)}), world_size=8)
        for update in ({"sharding": sharding}, {"sharding": sharding, "offload": True})
    )
    assert plain.memory.host == () and "teacher" not in lines(offloaded)
    (host,) = offloaded.memory.host
    assert host.num_bytes == lines(plain)["teacher"]
    assert plain.memory.lasting_bytes - offloaded.memory.lasting_bytes == host.num_bytes
    gathered = {line.name for line in offloaded.memory.phases["teacher forward"]}
    assert "gathered parameters" in gathered
    rows = estimate(config.model_copy(update={"distill": DistillConfig(exchange="stats")}), world_size=8)
    assert "teacher head, own slice" not in lines(rows), "FSDP2's own are multiplied"
    on_cpu = estimate(offloaded.setup.config, world_size=8, device="cpu", speeds=SPEEDS)
    assert "teacher" in lines(on_cpu) and on_cpu.memory.host == (), "a CPU has one memory"


def test_auto_knows_what_weight_gathers(folder: Path) -> None:
    """No whole teacher's head, and a gradient in fp32 whatever the models' precision: this moves the break-even."""
    last = {}
    for sharding in ("shard", "replicate"):
        teacher = {"model": str(folder / "teacher"), "sharding": sharding, "dtype": "bfloat16"}
        student = {"from_teacher": {"layers": 2}, "dtype": "bfloat16"}
        train = {"parallel": "fsdp", "tokens_per_step": None, "micro_batch_size": 1}
        config = run_config(folder, train=train, teacher=teacher, student=student)
        setup = estimate(config, world_size=2).setup
        lengths = {rows: config.data.model_copy(update={"seq_len": rows}) for rows in range(2, 128)}
        modes = {
            rows: settled(replace(setup, config=config.model_copy(update={"data": data})))
            for rows, data in lengths.items()
        }
        last[sharding] = max(rows for rows, mode in modes.items() if mode == "stats")
    # f V (2 D + 2 E + 4 D) against f V (2 D + 4 D), where D = E
    assert 16 < last["replicate"] < last["shard"] < 127
    assert last["shard"] / last["replicate"] == pytest.approx(8 / 6, rel=0.06)


def test_a_student_with_more_rows_than_its_teacher(folder: Path, tmp_path: Path) -> None:
    """Each head's own columns, a chunk of them, and one more softmax on the wire."""
    from transformers import LlamaConfig

    for name, rows in (("student", 192), ("teacher", 64)):
        LlamaConfig.from_pretrained(folder / "teacher", vocab_size=rows).save_pretrained(tmp_path / name)
    models = {side: {"model": str(tmp_path / side)} for side in ("student", "teacher")}
    distill = {"chunk_size": "auto", "loss_memory_mb": 4 * 16 * (192 + 64) / 2**20, "temperature": 1.0}
    train = {"parallel": "fsdp", "tokens_per_step": None}
    student = {"from_teacher": None, **models["student"]}
    config = run_config(folder, teacher=models["teacher"], student=student, distill=distill, train=train)
    estimated = estimate(config, world_size=4)
    assert estimated.setup.chunk == 16
    assert "(4 B x (V 192 + V' 64)) = 16 rows" in notes_of(estimated)[0]
    buffers = {}
    for exchange in ("weight", "stats"):
        phase = memory(replace(estimated.setup, exchange=exchange)).phases["loss"]
        buffers[exchange] = next(line.num_bytes for line in phase if line.name == "chunk buffers")
    assert buffers == {
        "weight": 4 * 16 * (192 + 64),
        "stats": 4 * 4 * 16 * (48 + 48),
    }  # rank 0's: 48 of the teacher's 64
    equal = stats_bytes(Head(192, 32, 4, 4, 4), Head(64, 32, 4, 4), 64, ranks=4, numbers=(6, 0))
    assert estimated.exchanges["stats"].num_bytes - equal == pytest.approx(3 * 64 * 4 * 2 * 4)  # two numbers to 4 ranks


def test_the_kernels_scratch_is_of_one_block(qwen: Path) -> None:
    config = qwen_config(qwen, parallel="fsdp").model_copy(update={"distill": DistillConfig(exchange="stats")})
    (scratch,) = (
        line
        for line in estimate(config, world_size=8, device="cpu", speeds=SPEEDS).memory.phases["loss"]
        if line.name == "row kernel"
    )
    columns = 151936 // 8
    assert scratch.num_bytes == 3 * 4 * columns * block_rows(columns, "cpu")
