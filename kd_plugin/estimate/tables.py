"""An estimate as tables: rich ones on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from typing import NamedTuple

from kd_plugin.estimate.account import USABLE, Choice, Estimate
from kd_plugin.estimate.from_config import chunk_rows, gpu_speed
from kd_plugin.estimate.setup import Line, Setup, teacher_forwards
from kd_plugin.estimate.sizes import ModelSizes
from kd_plugin.estimate.time_table import duration, exchange_times, missing_time, time_note, time_rows, time_unknowns
from kd_plugin.loss.chunk_size import ON_CPU_MIB, rows_by_speed
from kd_plugin.settings.units import GIB

_UNKNOWN = "the CUDA context, NCCL's and cuBLAS's buffers, fragmentation, scratch of compiled kernels"
_NAMES = {"single": "one process", "ddp": "ddp (replicated)", "fsdp": "fsdp (FSDP2)", "fsdp1": "fsdp1 (FSDP1)"}
_FSDP = {"fsdp": "FSDP2", "fsdp1": "FSDP1"}


class Table(NamedTuple):
    """Rows of text under a title; the second column is a number."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def show(estimate: Estimate) -> None:
    """Print the tables and notes of `estimate`."""
    show_tables(tables_of(estimate), notes_of(estimate))


def show_tables(tables: list[Table], notes: list[str]) -> None:
    """Print `tables` and the `notes` below them."""
    if sys.stdout.isatty():
        _show_rich(tables, notes)
    else:
        print(plain(tables, notes))


def tables_of(estimate: Estimate) -> list[Table]:
    """Models, memory, traffic, time, and the ways to spread the models if there are several, of `estimate`."""
    tables = [_models(estimate.setup), _memory(estimate), _wire(estimate)]
    if estimate.time is not None:
        tables.append(Table("time of one optimizer step", ("", "time", "share", "how"), time_rows(estimate.time)))
    return [*tables, _choices(estimate)] if len(estimate.choices) > 1 else tables


def notes_of(estimate: Estimate) -> list[str]:
    """The lines below the tables: what to choose and why, then what is not known."""
    setup = estimate.setup
    notes = [f"chunk size: {_chunk(setup)}", f"exchange: {_exchange(estimate)}", f"sharding: {_sharding(estimate)}"]
    if setup.teacher is not None and setup.accumulation > 1:
        notes.append(f"teacher ahead: {_ahead(estimate)}")
    notes += missing_time(setup) if estimate.time is None else [f"step time: {time_note(estimate.time)}"]
    for side, model in (("student", setup.student), ("teacher", setup.teacher)):
        if model is not None and model.activations is None:
            notes.append(f"unknown: {side} activations, so the peak is too low by them: {model.why_unknown}")
    if estimate.time is not None:
        notes += time_unknowns(setup)
    return [*notes, f"unknown, and in no figure: {_UNKNOWN}"]


def plain(tables: list[Table], notes: list[str]) -> str:
    """Tables and notes as text in aligned columns, for whatever is no terminal."""
    blocks = []
    for table in tables:
        rows = [table.columns, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
        lines = [
            "  ".join(cell.rjust(width) if i == 1 else cell.ljust(width) for i, (cell, width) in pairs).rstrip()
            for row in rows
            for pairs in [enumerate(zip(row, widths, strict=True))]
        ]
        blocks.append("\n".join([table.title, *(f"  {line}" for line in lines)]))
    return "\n\n".join([*blocks, "\n".join(notes)])


def _show_rich(tables: list[Table], notes: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for table in tables:
        drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, name in enumerate(table.columns):
            drawn.add_column(name, justify="right" if index == 1 else "left", no_wrap=index < 2)
        for row in table.rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)
    for note in notes:
        console.print(Text(note))


def _models(setup: Setup) -> Table:
    rows = [_model("student", setup.student, setup.config.student.dtype)]
    if setup.teacher is not None:
        rows.append(_model("teacher", setup.teacher, setup.config.teacher.dtype))
    mode = _mode(setup.mode, setup.world_size // setup.shard_ranks)
    title = (
        f"{mode} on {setup.world_size} x {setup.device}, {setup.rows} rows in the loss per rank and "
        f"micro-batch, {setup.accumulation} micro-batches per step"
    )
    return Table(title, ("model", "parameters", "head", "what"), rows)


def _model(side: str, model: ModelSizes, dtype: str) -> tuple[str, ...]:
    head = f"{model.vocab_size} x {model.width}{', tied' if model.tied else ''}"
    trained = "" if side == "teacher" or model.trainable == model.numel else f", {model.trainable / 1e6:,.1f}M trained"
    return (side, f"{model.numel / 1e6:,.1f}M", head, f"{model.kind}, {dtype}{trained}")


def _memory(estimate: Estimate) -> Table:
    rows = [_line(line) for line in estimate.memory.lasting]
    rows.append(("held from step to step", _size(estimate.memory.lasting_bytes), ""))
    rows += [_line(line._replace(name=f"in host memory: {line.name}")) for line in estimate.memory.host]
    for name, lines in estimate.memory.phases.items():
        worst = " (the worst phase)" if name == estimate.memory.worst_phase else ""
        rows.append((f"+ {name}", _size(estimate.memory.phase_bytes(name)), f"of which:{worst}"))
        rows += [_line(line, indent="    ") for line in lines]
    limit = "" if estimate.gpu_memory_gib is None else f"; {_limit(estimate)}"
    rows.append(("peak", _size(estimate.memory.peak_bytes), f"held + {estimate.memory.worst_phase}{limit}"))
    return Table("memory of the fullest rank", ("", "bytes", "how"), rows)


def _line(line: Line, indent: str = "") -> tuple[str, ...]:
    return (indent + line.name, _size(line.num_bytes), line.how)


def _wire(estimate: Estimate) -> Table:
    setup, times = estimate.setup, estimate.setup.accumulation
    rows = []
    for name, volume in estimate.exchanges.items():
        marks = [
            text for text, on in (("this run", name == setup.exchange), ("fewest", name == estimate.exchange)) if on
        ]
        shown = f"heads: {name}" + (f" ({', '.join(marks)})" if marks else "")
        how = f"{times} x {_decimal(volume.num_bytes)} = {volume.how}" if times > 1 else volume.how
        rows.append((shown, _decimal(times * volume.num_bytes), how))
    rows += [(line.name, _decimal(line.num_bytes), line.how) for line in estimate.parameters]
    total = times * estimate.exchanges[setup.exchange].num_bytes if setup.exchange in estimate.exchanges else 0.0
    total += sum(line.num_bytes for line in estimate.parameters)
    rows.append(("all, as configured", _decimal(total), f"exchange {setup.exchange}; f = (W - 1) / W, ring"))
    return Table("received per rank and optimizer step", ("", "bytes", "how"), rows)


def _choices(estimate: Estimate) -> Table:
    rows = [
        (
            f"{_layout(estimate, choice)}, teacher {_teacher(choice)}, {choice.exchange}",
            _size(choice.peak_bytes),
            _decimal(choice.step_bytes),
            "unknown" if choice.step_seconds is None else duration(choice.step_seconds),
            {None: "unknown", True: "yes", False: "no"}[choice.fits],
        )
        for choice in estimate.choices
    ]
    title = f"ways to spread the models, {_order(estimate)} first, each with its best exchange"
    return Table(title, ("student, teacher, exchange", "peak", "wire per step", "step", "fits"), rows)


def _order(estimate: Estimate) -> str:
    return "the least traffic" if estimate.choices[0].step_seconds is None else "the fastest"


def _chunk(setup: Setup) -> str:
    full = chunk_rows(setup, "auto")
    if setup.distill.chunk_size != "auto":
        return f"{setup.chunk} rows, as distill.chunk_size says; auto would give {min(full, setup.rows)}"
    fast = rows_by_speed(gpu_speed(setup)) if setup.device == "cuda" else None
    text = f"{full} rows, at which {setup.gpu}'s products take longer than its memory (fewer where memory is short)"
    if full != fast:
        text = _chunk_by_memory(setup, full)
    if full >= setup.rows:
        return f"{setup.chunk} rows = one chunk: {text}, and there are only {setup.rows}"
    return f"{text}, {-(-setup.rows // full)} chunks of at most {full}"


def _chunk_by_memory(setup: Setup, full: int) -> str:
    vocab, memory = setup.student.vocab_size, setup.distill.loss_memory_mb or ON_CPU_MIB
    row, cost = 8 * vocab, f"8 B x V {vocab}"
    if setup.teacher_columns not in (0, vocab):
        columns = setup.teacher_columns
        row, cost = 4 * (vocab + columns), f"4 B x (V {vocab} + V' {columns})"
    exact = int(memory * 2**20) // row
    rounded = f" -> {full} (a multiple of 64)" if full != exact else ""
    return f"{memory:g} MiB / ({cost}) = {exact}{rounded} rows"


def _ahead(estimate: Estimate) -> str:
    setup, forwards = estimate.setup, teacher_forwards(estimate.setup)
    together = min(setup.together, setup.accumulation)
    text = f"reads {together} of {setup.accumulation} micro-batches at once, {forwards} forwards per step"
    if setup.config.teacher.micro_batch_size != "auto":
        return text
    if estimate.gpu_memory_gib is None:
        return f"{text}; auto, if they fit: give --gpu-memory-gib to see"
    return f"{text}; auto, {'all' if forwards == 1 else 'as many as fit'}"


def _exchange(estimate: Estimate) -> str:
    setup, volumes = estimate.setup, estimate.exchanges
    if setup.world_size == 1:
        return "none, one rank"
    listed = ", ".join(f"{name} {_decimal(volume.num_bytes)}" for name, volume in volumes.items())
    text = f"{estimate.exchange}, the fewest bytes per micro-batch ({listed}){exchange_times(estimate)}"
    if setup.exchange == estimate.exchange:
        return text
    how = "auto takes" if setup.distill.exchange == "auto" else "this configuration says"
    return f"{text}; {how} {setup.exchange}"


def _sharding(estimate: Estimate) -> str:
    if estimate.setup.world_size == 1 and estimate.gpu_memory_gib is not None:
        return f"one rank; {_limit(estimate)}"
    leanest = min(estimate.choices, key=lambda choice: choice.peak_bytes)
    if estimate.gpu_memory_gib is None:
        return f"give --gpu-memory-gib to have one chosen; least memory: {_described(estimate, leanest)}"
    if estimate.chosen is None:
        lacking = f"nothing fits {_limit(estimate)}; the leanest is {_described(estimate, leanest)}"
        return f"{lacking}: more ranks, activation_checkpointing, a smaller micro_batch_size or seq_len"
    return f"{_described(estimate, estimate.chosen)}: {_order(estimate)} of what fits {estimate.gpu_memory_gib:g} GiB"


def _described(estimate: Estimate, choice: Choice) -> str:
    sizes = f"{_size(choice.peak_bytes)}, {_decimal(choice.step_bytes)} per step"
    sizes += "" if choice.step_seconds is None else f", {duration(choice.step_seconds)}"
    return f"{_layout(estimate, choice)}, teacher {_teacher(choice)}, exchange {choice.exchange} ({sizes})"


def _limit(estimate: Estimate) -> str:
    assert estimate.gpu_memory_gib is not None
    usable = USABLE * estimate.gpu_memory_gib
    verdict = "fits" if estimate.memory.peak_bytes <= usable * GIB else "does not fit"
    return f"this {verdict} 90 % of {estimate.gpu_memory_gib:g} GiB = {usable:.3g} GiB"


def _teacher(choice: Choice) -> str:
    return "shard" if choice.teacher_sharded else "replicate"


def _layout(estimate: Estimate, choice: Choice) -> str:
    return _mode(choice.mode, estimate.setup.world_size // choice.shard_ranks)


def _mode(mode: str, copies: int) -> str:
    if mode in _FSDP and copies > 1:
        return f"hsdp ({_FSDP[mode]}, {copies} copies)"
    return _NAMES.get(mode, f"ZeRO-{mode[-1]}")


def _size(num_bytes: float) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.1f} KiB"
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"


def _decimal(num_bytes: float) -> str:
    if num_bytes < 1e6:
        return f"{num_bytes / 1e3:,.1f} kB"
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
