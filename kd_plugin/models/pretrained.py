"""`from_pretrained` for files that a user named: all weights come from them, and whatever is wrong is one line.

Notable decisions:
- libraries raise what they like over a broken file, so every exception becomes a ModelError that names the setting and
  the file; a package that is missing stays an ImportError, which names it;
- a weight that the files lack would be drawn at random with a warning among others, which is another experiment:
  refused. Weights without a place in the model are a warning (value heads, layers for several tokens at once).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_plugin.models.files import ADAPTER_FOUND, ModelError, ResolvedSource, broken_file
from kd_plugin.settings.extras import require
from kd_plugin.settings.run import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["import_transformers", "load_causal_lm", "load_pretrained", "refuse_pickle"]

logger = logging.getLogger(__name__)


def load_pretrained(auto: Any, source: ResolvedSource, config: ModelSource, where: str, **kwargs: Any) -> Any:
    """Call `auto.from_pretrained` for the files of `source`.

    Raises:
        ModelError: whatever it raises, in one line that names the setting `where` and, if it can be told, the file.
        ImportError: a package is missing.
    """
    if source.gguf_file:
        require("gguf", "GGUF files need it")
        kwargs["gguf_file"] = source.gguf_file
    if config.revision:
        kwargs["revision"] = config.revision
    try:
        return auto.from_pretrained(source.path_or_id, trust_remote_code=config.trust_remote_code, **kwargs)
    except ImportError:  # names the package
        raise
    except Exception as error:
        name = "/".join(filter(None, source))
        raise ModelError(f"{where}: {name!r} cannot be loaded: {broken_file(source) or _reason(error)}") from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    first = text.partition("\n")[0].rstrip()
    if first.endswith(":"):  # what it announces is in the lines that follow
        first = " ".join(text.split())
    return first if first and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {first}"


def load_causal_lm(source: ResolvedSource, config: ModelSource, where: str, **kwargs: Any) -> PreTrainedModel:
    """Load a model with all of its weights from the files: what they lack, the library would draw at random.

    Raises:
        ModelError: it cannot be loaded, weights that are missing or of another shape, or an adapter of PEFT on a base.
    """
    # Shapes that do not fit are reported here with their names, and by the library without.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, loading_info = load_pretrained(import_transformers().AutoModelForCausalLM, source, config, where, **kwargs)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{where}: {source.path_or_id} is {ADAPTER_FOUND}")
    _check_loaded(loading_info, source, where)
    return model


def _check_loaded(loading_info: Mapping[str, Any], source: ResolvedSource, where: str) -> None:
    """Refuse weights that do not fit or are missing; warn of those that have no place in the model."""
    if wrong := sorted(loading_info["mismatched_keys"]):
        name, in_file, in_model = wrong[0]
        raise ModelError(
            f"{where}: {source.path_or_id}: {len(wrong)} weight(s) do not fit its config.json, first {name}, which is "
            f"{list(in_file)} in the file and {list(in_model)} in the model: use files that belong together"
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise ModelError(
            f"{where}: {source.path_or_id} has no weights for {len(missing)} of the model's parameters, first "
            f"{missing[0]}, which would be random: use files that belong to its config.json, of a causal language model"
        )
    if surplus := sorted(loading_info["unexpected_keys"]):
        logger.warning(
            "%s: %d weight(s) of the files have no place in the model, first %s", where, len(surplus), surplus[0]
        )


def refuse_pickle(source: ResolvedSource, where: str) -> None:
    """Raise ModelError where a folder has only weights that can run code when they are read."""
    folder = Path(source.path_or_id)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{where}: {folder} has .bin weights only, which can run code when loaded; convert them to "
            f"safetensors, or set {where.partition('.')[0]}.allow_pickle=true if you trust them"
        )


def import_transformers() -> Any:
    """Import the library, or raise ImportError with the pip command that brings it."""
    require("transformers", "loading models needs it")
    import transformers

    return transformers
