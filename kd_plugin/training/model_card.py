"""The README.md of an exported student: where it comes from, how it was trained, what it came to, with what."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping

import yaml

from kd_plugin.models.files import is_local
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.yaml_file import to_yaml
from kd_plugin.training.report import quality_rows

__all__ = ["adapter_card", "model_card"]

_PACKAGES = ("kd-plugin", "torch", "transformers", "tokenizers", "datasets", "deepspeed", "peft")


def model_card(config: RunConfig, before: Mapping[str, float], after: Mapping[str, float], *, step: int) -> str:
    """The card as Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        config: the run, as it was resolved.
        before: numbers of the evaluation before the first step.
        after: those of the exported student.
        step: the optimizer step that it is of.
    """
    rows = [
        f"| {label.replace('||', ' to ')} | {old} | {new} | {change} |"
        for label, old, new, change in quality_rows(before, after)
    ]
    data, train = config.data, config.train
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(_metadata(config), sort_keys=False)}---\n",
            "# A distilled language model\n",
            f"- Teacher: `{config.teacher.model}`{_revision(config.teacher.revision)}",
            f"- Student: {_origin(config)}",
            f"- Data: `{data.train}`{_revision(data.subset)}, packed to {data.seq_len} tokens; held out: "
            + (f"`{data.eval}`" if data.eval else data.eval_split or f"{data.eval_fraction:g} of the documents"),
            f"- Steps: {step} of {train.max_steps}, learning rate {train.learning_rate:g} ({train.schedule})\n",
            "| on held-out text | before | after | change |\n|---|---|---|---|",
            *rows,
            "\n## Settings\n",
            f"```yaml\n{to_yaml(config)}```\n",
            "## Versions\n",
            *(f"- {name} {version}" for name, version in _versions().items()),
            "",
        ]
    )


def adapter_card(config: RunConfig) -> str:
    """The README.md of the adapters alone; empty for a student without."""
    if config.student.lora is None or not config.student.model:
        return ""
    base = _hub_names([config.student.model])
    metadata = {key: value for key, value in _metadata(config).items() if key != "base_model"}  # or the teacher's
    metadata |= {"library_name": "peft"} | ({"base_model": base[0]} if base else {})
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
            "# LoRA adapters of a distilled language model\n",
            f"- Base: `{config.student.model}`{_revision(config.student.revision)}",
            f"- Adapters: {_adapters(config)}",
            f"- Teacher: `{config.teacher.model}`{_revision(config.teacher.revision)}\n",
            "The folder above holds base and adapters as one model, and says how they were trained.",
            "",
        ]
    )


def _without_bars(rows: list[tuple[str, str, str, str]]) -> list[tuple[str, ...]]:
    return [(label.replace("||", " to "), *numbers) for label, *numbers in rows]


def _metadata(config: RunConfig) -> dict[str, object]:
    """What the hub reads; models on this machine are no models of the hub."""
    hub = _hub_names([config.student.model, config.teacher.model])
    base = {"base_model": hub[0]} if hub else {}
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **base,
        "tags": ["knowledge-distillation", "kd_plugin", *(["lora"] if config.student.lora else [])],
    }


def _hub_names(names: Iterable[str | None]) -> list[str]:
    return [name for name in names if name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not is_local(name)]


def _origin(config: RunConfig) -> str:
    if config.student.lora is not None:
        return f"{_base(config)}, trained by LoRA adapters ({_adapters(config)}), which are merged into it"
    return _base(config)


def _adapters(config: RunConfig) -> str:
    lora = config.student.lora
    assert lora is not None
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    said = f"rank {lora.r}, alpha {lora.lora_alpha}{' (rank-stabilised)' if lora.use_rslora else ''}, on {targets}"
    return said + (f"; trained whole: {', '.join(lora.modules_to_save)}" if lora.modules_to_save else "")


def _base(config: RunConfig) -> str:
    student = config.student
    if student.from_teacher:
        return f"{student.from_teacher.layers} layers of the teacher"
    if student.from_config is not None:
        return f"fresh, in the shape of `{student.model or config.teacher.model}` with `{student.from_config}`"
    return f"`{student.model}`{_revision(student.revision)}"


def _revision(name: str | None) -> str:
    return f" ({name})" if name else ""


def _versions() -> dict[str, str]:
    """Of what is installed; a checkout of this package need not be."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
