"""Teacher, student and tokenizer from a YAML section.

Notable decisions:
- a source is resolved to files before anything is read, so a wrong path costs a second and not a minute;
- GGUF weights are unpacked into an ordinary model at once (packed ones can be neither trained nor sharded),
  which is kept in the Hugging Face cache;
- the student's parameters are float32 masters, whatever the precision of the forward pass;
- weights that can run code (`.bin`) and Python code beside a model need an explicit yes.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_plugin.models.adapters import add_adapters, say_what_is_trained, warn_of_idle_freeze
from kd_plugin.models.files import ModelError, ResolvedSource, resolve_source, resolve_tokenizer, section_name
from kd_plugin.models.pretrained import import_transformers, load_causal_lm, load_pretrained, refuse_pickle
from kd_plugin.models.quantization import check_quantised, loading_options, refuse_quantised_student
from kd_plugin.models.students import config_with, freeze, student_from_layers
from kd_plugin.settings.run import ModelSource, StudentConfig, TeacherConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelError",
    "ResolvedSource",
    "build_student",
    "check_positions",
    "load_teacher",
    "load_tokenizer",
    "progress_bars",
    "read_config",
    "resolve_source",
]


logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


def load_tokenizer(config: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `config.tokenizer`, or else the one beside `config.model`.

    Raises:
        ModelError: it is not found, or cannot be loaded.
    """
    transformers = import_transformers()
    source = resolve_tokenizer(config)
    where = f"{section_name(config)}.{'tokenizer' if config.tokenizer else 'model'}"
    load = partial(load_pretrained, transformers.AutoTokenizer, config=config, where=where)
    if source.gguf_file and (Path(source.path_or_id) / source.gguf_file).is_file():
        source = _unpacked(source, "tokenizer", partial(load, source))
    return load(source)


def load_teacher(config: TeacherConfig, device: torch.device = CPU) -> PreTrainedModel:
    """Load the frozen teacher on the CPU: eval mode, no gradients, parameters in `config.dtype`.

    One that `config.quantization` has quantised is loaded on `device`, where it will run.

    Raises:
        ModelError: it is not found, cannot be loaded, or not be quantised so.
        ImportError: a package is missing.
    """
    dtype, how = getattr(torch, config.dtype), config.quantization
    if how is None:
        return _load_model(config, dtype).eval().requires_grad_(False)
    teacher = _load_model(config, dtype, **loading_options(how, dtype, device))
    check_quantised(teacher, how)
    return teacher.eval().requires_grad_(False)


def build_student(config: StudentConfig, teacher: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """Make the student on the CPU in train mode, with float32 parameters of its own; the teacher is only read.

    Call it before the teacher is attached or sharded. `seed` decides the weights of a fresh student and of adapters,
    so that all ranks start alike; the global random state is left as it was.

    Raises:
        ModelError, StudentError: it is not found, cannot be loaded, or cannot be made from this teacher.
    """
    if config.from_teacher:
        student = student_from_layers(teacher, config.from_teacher.layers, partial(_empty, teacher, config))
    elif config.from_config is not None:
        student = _fresh_student(config, config.from_config, teacher, seed)
    else:
        student = _load_model(config, torch.float32)
        refuse_quantised_student(student, "student.model")
    if config.lora is not None:
        add_adapters(student, config.lora, seed=seed)
        warn_of_idle_freeze(student, config.freeze)
    freeze(student, config.freeze)
    if config.lora is not None:
        say_what_is_trained(student)
    return student.train()


def _fresh_student(
    config: StudentConfig, values: dict[str, Any], teacher: PreTrainedModel, seed: int
) -> PreTrainedModel:
    base = read_config(config) if config.model else teacher.config
    new = config_with(base, values, where="student.from_config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return import_transformers().AutoModelForCausalLM.from_config(
            new, dtype=torch.float32, trust_remote_code=config.trust_remote_code, **_attention(config)
        )


def check_positions(model: PreTrainedModel, seq_len: int, *, role: str) -> None:
    """Compare `seq_len` with the positions that `model` was made for.

    Raises:
        ModelError: the model has a table with one row per position, which is shorter (GPT-2, OPT). Computed positions
            (rotary) beyond those trained on are only a warning.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or not 0 < limit < seq_len:
        return
    fault = f"data.seq_len {seq_len} is beyond the {role}'s {limit} positions"
    tables = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if any(table.ndim == 2 and ("position" in name or ".wpe." in name) for name, table in tables.items()):
        raise ModelError(f"{fault}, each of which it has learnt: set data.seq_len to {limit} or less")
    logger.warning("%s: it has seen none of that length, and its predictions there may be poor", fault)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Hide Transformers' bars for loading, unpacking and downloading while the body runs, unless `shown`."""
    bars = import_transformers().utils.logging
    if shown or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        with _without_gguf_bar():
            yield
    finally:
        bars.enable_progress_bar()


@contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """Hide the GGUF reader's own bar, which Transformers' switch does not reach, where it can be found."""
    try:
        from transformers import modeling_gguf_pytorch_utils as gguf_files

        tqdm = gguf_files.tqdm  # pyright: ignore[reportPrivateImportUsage]  (it is replaced there)
    except (ImportError, AttributeError):
        yield
        return
    gguf_files.tqdm = partial(tqdm, disable=True)  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        gguf_files.tqdm = tqdm  # pyright: ignore[reportPrivateImportUsage]


def _load_model(config: ModelSource, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load from whatever `config` names; `options` go to `from_pretrained`."""
    source, where = resolve_source(config), f"{section_name(config)}.model"
    if source.gguf_file and (Path(source.path_or_id) / source.gguf_file).is_file():
        name = f"model-{str(dtype).removeprefix('torch.')}"
        source = _unpacked(source, name, partial(_load_gguf, config, source, dtype))
    if source.gguf_file and options:
        raise ModelError(
            f"{where}: teacher.quantization wants a GGUF file that is on this machine and can be unpacked in HF_HOME, "
            f"which {source.gguf_file} is not: download it, let HF_HOME be writable, or leave teacher.quantization out"
        )
    if source.gguf_file:
        return _load_gguf(config, source, dtype)
    kwargs: dict[str, Any] = {"dtype": dtype, **_attention(config), **options}
    if not config.allow_pickle:
        refuse_pickle(source, where)
        kwargs["use_safetensors"] = True
    return load_causal_lm(source, config, where, **kwargs)


def _load_gguf(config: ModelSource, source: ResolvedSource, dtype: torch.dtype) -> PreTrainedModel:
    """Load a GGUF file's weights unpacked, without what the loader leaves behind: its quantizer forbids training."""
    transformers, where = import_transformers(), f"{section_name(config)}.model"
    kwargs = {"dtype": dtype, "quantization_config": transformers.GgufConfig(dequantize=True)}
    model = load_causal_lm(source, config, where, **kwargs, **_attention(config))
    model.config.quantization_config = None
    fresh = _empty(model, config, config_with(model.config, {}, where=where), dtype=dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    return fresh.eval()


def _unpacked(
    source: ResolvedSource, name: str, build: Callable[[], PreTrainedModel | PreTrainedTokenizerBase]
) -> ResolvedSource:
    """Unpack a GGUF file into an ordinary folder `name` in the cache, by `build` the first time; returns the folder.

    Reading a GGUF file takes half a minute where the same weights as safetensors take a second. The folder is
    keyed by the file's content and the library's version, and appears under its name only when complete. One
    rank unpacks, the others of its machine wait for it.
    """
    from filelock import FileLock
    from huggingface_hub import constants

    assert source.gguf_file is not None
    digest = _digest(Path(source.path_or_id) / source.gguf_file)
    key = f"{digest[:24]}-{import_transformers().__version__}"
    folder = Path(constants.HF_HOME) / "kd_plugin" / key / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{name}.lock")):
                if not folder.is_dir():
                    _save_whole(build(), folder)
                    logger.info("unpacked %s, kept in %s", source.gguf_file, folder)
        except OSError as error:
            logger.warning("cannot keep the unpacked %s in %s: %s", source.gguf_file, folder, error)
            return source
    return ResolvedSource(str(folder), None)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _save_whole(made: PreTrainedModel | PreTrainedTokenizerBase, folder: Path) -> None:
    """Write what `save_pretrained` writes, on whatever rank: a model's own does nothing but on rank 0."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        inside = Path(unfinished) / folder.name
        if isinstance(made, torch.nn.Module):
            from safetensors.torch import save_model

            made.config.save_pretrained(inside)
            made.generation_config.save_pretrained(inside)
            save_model(made, str(inside / "model.safetensors"), metadata={"format": "pt"})
        else:
            made.save_pretrained(inside)
        inside.rename(folder)


def read_config(config: ModelSource) -> PreTrainedConfig:
    """Read the configuration of `config.model`, without its weights.

    Raises:
        ModelError: it is not found, or cannot be loaded.
    """
    return load_pretrained(
        import_transformers().AutoConfig, resolve_source(config), config, f"{section_name(config)}.model"
    )


def _empty(
    model: PreTrainedModel, config: ModelSource, new: PreTrainedConfig, *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model of the class of `model`; its weights are about to be filled, so none are drawn."""
    from transformers.initialization import no_init_weights

    attention = _attention(config) or {"attn_implementation": model.config._attn_implementation}
    with no_init_weights():
        fresh = type(model)._from_config(new, dtype=dtype, **attention)
    fresh.tie_weights()  # left out with the initialisation
    return fresh


def _attention(config: ModelSource) -> dict[str, str]:
    return {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
