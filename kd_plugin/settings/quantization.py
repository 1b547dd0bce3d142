# pyright: strict
"""How the weights of a frozen teacher are quantised while it is loaded; nothing here imports torch.

Notable decisions:
- short names stand for what is used most; a mapping is what Transformers writes into a config.json and reads from it;
- the head stays as it is, since the loss multiplies by it: what would quantise it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator

__all__ = ["METHODS", "STAY_PACKED", "Quantization", "bits_of", "method_of", "mixes_rows"]

QuantizationName = Literal["int8", "int4", "bitsandbytes_8bit", "bitsandbytes_4bit"]

METHODS = ("torchao", "bitsandbytes")
"""What quantises a teacher here: values of Transformers' `quant_method`, and names of packages."""

STAY_PACKED = {"awq", "aqlm", "bitsandbytes", "eetq", "gptq", "hqq", "quanto", "spqr", "torchao", "vptq"}
"""Methods whose checkpoints stay quantised when they are loaded; Transformers unpacks others where kernels are missing.
"""

_SHORT = {
    "int8": ("torchao", 8),
    "int4": ("torchao", 4),
    "bitsandbytes_8bit": ("bitsandbytes", 8),
    "bitsandbytes_4bit": ("bitsandbytes", 4),
}
_HEAD_TOO = ("include_input_output_embeddings", "untie_embedding_weights")


def method_of(quantization: str | Mapping[str, Any]) -> str:
    """The `quant_method` of a short name or a mapping, which is its package, too; "" for a mapping without one."""
    if isinstance(quantization, str):
        return _SHORT[quantization][0]
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"  # as Transformers reads it
    method = quantization.get("quant_method")
    return str(getattr(method, "value", method) or "")  # an enumeration's, where Transformers' to_dict() made it


def bits_of(quantization: str | Mapping[str, Any]) -> int | None:
    """Bits of one quantised weight, without its scale; None where the mapping does not say."""
    if isinstance(quantization, str):
        return _SHORT[quantization][1]
    if method_of(quantization) == "bitsandbytes":
        return 4 if quantization.get("load_in_4bit") else 8
    kind = str(_default_type(quantization).get("_type", ""))
    return next((bits for bits in (4, 8) if f"{bits}Weight" in kind), None)


def mixes_rows(quantization: str | Mapping[str, Any]) -> bool:
    """Whether what one token becomes depends on others: LLM.int8 takes out columns in which any token is an outlier."""
    if method_of(quantization) != "bitsandbytes" or bits_of(quantization) != 8:
        return False
    return isinstance(quantization, str) or bool(quantization.get("llm_int8_threshold", 6.0))


def _default_type(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    kinds: Any = quantization.get("quant_type")
    kind: Any = cast("Mapping[str, Any]", kinds).get("default") if isinstance(kinds, Mapping) else None
    return cast("Mapping[str, Any]", kind) if isinstance(kind, Mapping) else {}


def _checked(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """`value`, if it is a way to quantise that leaves the head as it is."""
    if isinstance(value, str):
        return value
    method = method_of(value)
    if method not in METHODS:
        raise ValueError(
            f"quant_method is {method or None!r}, wanted {' or '.join(METHODS)}, and beside it what Transformers "
            "writes into a config.json; a checkpoint that is quantised already needs no setting"
        )
    if method == "bitsandbytes" and bool(value.get("load_in_8bit")) == bool(value.get("load_in_4bit")):
        raise ValueError("bitsandbytes wants one of load_in_8bit and load_in_4bit to be true")
    if method == "torchao" and not _default_type(value).get("_type"):
        raise ValueError(
            f"quant_type is {value.get('quant_type')!r}, wanted what torchao writes, such as "
            "{default: {_type: Int8WeightOnlyConfig, _data: {}}}; int8 and int4 are short for the usual ones"
        )
    for key in _HEAD_TOO:
        if value.get(key):
            raise ValueError(f"{key} is true, but the loss multiplies by the head as it is: leave the key out")
    return value


Quantization = Annotated[QuantizationName | dict[str, Any], AfterValidator(_checked)]
"""A short name, or a mapping as in a config.json."""
