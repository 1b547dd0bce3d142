"""The command `kd-plugin`.

Notable decisions:
- nothing here imports torch until a command needs it, so that `validate` answers at once;
- exit codes: 0 done, 1 `validate` found faults, 2 the run could not be started or the command was misused;
  130 and 143: SIGINT or SIGTERM ended it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kd_plugin import __version__
from kd_plugin.cli.launcher import one_line_errors, run_training
from kd_plugin.cli.recipes import config_path, copy_recipe, recipe, recipes
from kd_plugin.settings.quantization import method_of
from kd_plugin.settings.run import DataConfig, DistillConfig, RunConfig, StudentConfig, TeacherConfig
from kd_plugin.settings.schema import json_schema, markdown
from kd_plugin.settings.yaml_file import ConfigError, load_config
from kd_plugin.training.preflight import SetupError, early_problems, idle_settings
from kd_plugin.training.preflight_models import model_warnings

__all__ = ["app", "main", "recipes"]

app = typer.Typer(
    help="Distil a teacher into a student under DeepSpeed or FSDP, from one YAML file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Unknown options are passed on as overrides, whose parser says what is wrong with them.
_OVERRIDES = {"ignore_unknown_options": True}
_Config = Annotated[Path, typer.Argument(help="YAML file, or the name of a recipe.", show_default=False)]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Values that replace the file's.", show_default=False),
]
_Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")]
# The DeepSpeed launcher inserts this before the user's arguments; the rank is read from LOCAL_RANK.
_LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


def _examples(*lines: str) -> str:
    # \b keeps click from re-wrapping the lines
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kd-plugin {__version__}")
        raise typer.Exit


@app.callback(
    epilog=_examples(
        "kd-plugin configs",
        "kd-plugin validate configs/smollm2_135m_to_8l_fsdp2.yaml train.max_steps=10",
    )
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    local_rank: _LocalRank = None,
) -> None:
    pass


@app.command(
    context_settings=_OVERRIDES,
    epilog=_examples(
        "kd-plugin validate configs/smollm2_135m_to_8l_fsdp2.yaml",
        "kd-plugin validate my.yaml distill.temperature=2 train.max_grad_norm=null",
    ),
)
def validate(config: _Config, overrides: _Overrides = None, verbose: _Verbose = False) -> None:
    """Check a configuration, and that its files and packages are there; no model is loaded.

    Exit code 0 if it is good; else 1, and every fault is printed with its file and line.
    """
    with one_line_errors(verbose, exit_code=1):
        run_config = load_config(config_path(config), overrides or ())
        if problems := early_problems(run_config):
            raise SetupError("\n".join(problems))
    print(f"{config}: ok\n{_summary(run_config)}")
    for line in [*idle_settings(run_config), *model_warnings(run_config)]:
        print(f"warning: {line}")


@app.command(
    context_settings=_OVERRIDES,
    epilog=_examples(
        "kd-plugin data my.yaml",
        "kd-plugin data my.yaml data.train=chats.jsonl data.max_documents=1000 --rows 1",
    ),
)
def data(
    config: _Config,
    overrides: _Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Training sequences to show.")] = 3,
    verbose: _Verbose = False,
) -> None:
    """Show the data of a run: how much, what is left out, and sequences with what is trained on marked.

    No model is loaded. All text is tokenised, since packing needs its lengths, into data.cache, which the run then
    reads. What is trained on stands in [[ ]], or in colour on a terminal. Exit code 2 if it cannot be read.
    """
    with one_line_errors(verbose, exit_code=2):
        run_config = load_config(config, overrides or ())
        from kd_plugin.cli.data_preview import show_data

        show_data(run_config, rows)


@app.command(
    context_settings=_OVERRIDES,
    epilog=_examples(
        "kd-plugin train configs/smollm2_135m_to_8l_fsdp2.yaml train.max_steps=10",
        "torchrun --nproc-per-node 2 -m kd_plugin.cli train configs/smollm2_135m_to_8l_fsdp2.yaml",
    ),
)
def train(
    config: _Config,
    overrides: _Overrides = None,
    verbose: _Verbose = False,
    local_rank: _LocalRank = None,
) -> None:
    """Train, alone or under torchrun or deepspeed.

    Exit code 2 if the run could not be started, 130 or 143 if Ctrl-C or SIGTERM ended it.
    """
    with one_line_errors(verbose, exit_code=2):
        run_training(load_config(config_path(config), overrides or ()))


@app.command(
    context_settings=_OVERRIDES,
    epilog=_examples(
        "kd-plugin estimate configs/smollm2_135m_to_8l_fsdp2.yaml --world-size 2",
        "kd-plugin estimate my.yaml train.micro_batch_size=4 --world-size 64 --gpu-memory-gib 80",
    ),
)
def estimate(
    config: _Config,
    overrides: _Overrides = None,
    world_size: Annotated[int, typer.Option(help="Ranks of the run.")] = 1,
    rows: Annotated[
        int | None,
        typer.Option(help="Valid tokens per rank and micro-batch, if not all of them.", show_default=False),
    ] = None,
    gpu_memory_gib: Annotated[
        float | None, typer.Option(help="Memory of one GPU, to say what fits.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="The GPU, such as H100; default: the one that is here.", show_default=False)
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a run on CPUs.")] = False,
    verbose: _Verbose = False,
) -> None:
    """Estimate memory, traffic and time of a run, and say what to choose; no weights are loaded.

    A GPU's time is by a table of peaks; with --cpu this processor is measured for about two seconds.

    Exit code 2 if the run could not be started as configured.
    """
    with one_line_errors(verbose, exit_code=2):
        run_config = load_config(config_path(config), overrides or ())
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else an installed DeepSpeed says that it found no GPU
        from kd_plugin.estimate.account import estimate as account
        from kd_plugin.estimate.tables import show

        device = "cpu" if cpu else "cuda"
        sizes = {"world_size": world_size, "rows": rows, "gpu_memory_gib": gpu_memory_gib}
        show(account(run_config, **sizes, device=device, gpu=gpu))


@app.command(epilog=_examples("kd-plugin configs", "kd-plugin configs smollm2_135m_to_8l_fsdp2 --copy my.yaml"))
def configs(
    name: Annotated[str | None, typer.Argument(help="Print this one.", show_default=False)] = None,
    copy: Annotated[
        Path | None, typer.Option(metavar="DEST", help="Copy it to this file or directory instead.")
    ] = None,
) -> None:
    """List, print or copy the recipes that come along."""
    with one_line_errors(verbose=False, exit_code=2):
        if name is None:
            if copy:
                raise ConfigError("--copy wants to know which: kd-plugin configs NAME --copy DEST")
            width = max(map(len, recipes()))
            print("\n".join(f"{key:{width}}  {about}" for key, about in recipes().items()))
        elif copy is None:
            print(recipe(name).read_text(encoding="utf-8"), end="")
        else:
            print(copy_recipe(recipe(name), copy))


@app.command(epilog=_examples("kd-plugin schema > schema.json", "kd-plugin schema --markdown > configs/README.md"))
def schema(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A table of all settings instead.")] = False,
) -> None:
    """Print the JSON schema of configuration files.

    Editors complete and check keys with it, see the first line of each recipe.
    """
    print(markdown(recipes()) if as_markdown else json.dumps(json_schema(), indent=2))


@app.command(epilog=_examples("kd-plugin env", "kd-plugin env > environment.txt"))
def env() -> None:
    """Print versions and devices, for bug reports."""
    from kd_plugin.cli.environment import describe_environment

    print("\n".join(f"{key:14} {value}" for key, value in describe_environment().items()))


def main() -> None:
    """Entry point of `kd-plugin`."""
    app(prog_name="kd-plugin")


def _summary(config: RunConfig) -> str:
    teacher, data, step = config.teacher, config.data, config.train
    sequences = f"{step.micro_batch_size} x {data.seq_len} tokens per rank and forward"
    return "\n".join(
        (
            f"  teacher  {teacher.model} ({teacher.dtype}, {_quantised(teacher)}{teacher.sharding})",
            f"  student  {_origin(config.student)} ({config.student.dtype}{_adapters(config.student)})",
            f"  loss     {_loss(config.distill)}",
            f"  data     {_texts(data)}, {sequences}",
            f"  train    {step.max_steps} steps, lr {step.learning_rate:g}, parallel {step.parallel}",
            f"  output   {config.log.output_dir}",
        )
    )


def _quantised(teacher: TeacherConfig) -> str:
    if teacher.quantization is None:
        return ""
    return f"{teacher.quantization if isinstance(teacher.quantization, str) else method_of(teacher.quantization)}, "


def _texts(data: DataConfig) -> str:
    if isinstance(data.train, str):
        return data.train
    return " + ".join(f"{source.weight:g} {source.source}" for source in data.train)


def _origin(student: StudentConfig) -> str | None:
    if student.from_teacher:
        return f"{student.from_teacher.layers} layers of the teacher"
    if student.from_config:
        return f"fresh, {student.model or 'teacher'}'s configuration with {student.from_config}"
    return student.model


def _adapters(student: StudentConfig) -> str:
    if student.lora is None:
        return ""
    targets = student.lora.target_modules
    return f", LoRA r {student.lora.r} on {targets if isinstance(targets, str) else ' '.join(targets)}"


def _loss(distill: DistillConfig) -> str:
    terms = distill.terms and "(" + " + ".join(f"{term.weight:g} {term.name}" for term in distill.terms) + ")"
    soft = f"{distill.soft_weight:g} {terms or distill.divergence} (T={distill.temperature:g})"
    return f"{soft} + {distill.hard_weight:g} cross-entropy"


if __name__ == "__main__":
    main()
