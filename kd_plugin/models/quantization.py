"""A teacher whose weights are quantised while it is loaded, by Transformers and the package that it names.

Notable decisions:
- what Transformers leaves out by itself stays out: the head, and an embedding that is tied to it;
- torchao would set torch's precision of fp32 products and Inductor's options for the whole process: it is told not to;
- packed weights are made for a kind of device, so on a GPU they are quantised there, layer by layer, as files are read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_plugin.distributed.torch_internals import inner_tensors, is_wrapper_subclass
from kd_plugin.models.files import ModelError
from kd_plugin.settings.extras import require
from kd_plugin.settings.quantization import method_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_quantised", "loading_options", "quantization_method", "refuse_quantised_student"]

logger = logging.getLogger(__name__)

_WHERE = "teacher.quantization"
GROUP = 128
"""Columns of a weight that share a scale in `int4`."""


def loading_options(quantization: str | Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that quantise a teacher as `teacher.quantization` says.

    Args:
        quantization: a short name or a mapping, checked.
        dtype: of everything else in the teacher, and of its products.
        device: where it will run.

    Raises:
        ImportError: the package is not installed; the message has the pip command that brings it.
        ModelError: it cannot be done on this device or in this dtype, or the mapping is none that Transformers reads.
    """
    require(method_of(quantization), f"{_WHERE} needs it")
    placed: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        made = _by_name(quantization, dtype, device) if isinstance(quantization, str) else _by_mapping(quantization)
    except ModelError:
        raise
    except Exception as error:  # of whatever kind the libraries raise over a mapping
        reason = " ".join(str(error).split())
        raise ModelError(f"{_WHERE}: {quantization!r} cannot be read: {type(error).__name__}: {reason}") from error
    return {"quantization_config": made, **placed}


def _by_mapping(values: Mapping[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict({"quant_method": method_of(values), **values})


def _by_name(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    if name == "bitsandbytes_8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if name == "bitsandbytes_4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False, version=2))
    return transformers.TorchAoConfig(_int4(dtype, device))


def _int4(dtype: torch.dtype, device: torch.device) -> Any:
    """torchao's configuration for 4-bit weights, packed for the kernel that torch has on `device`."""
    if device.type == "cpu":
        return _int4_of_cpus()
    if dtype != torch.bfloat16:
        raise ModelError(
            f"{_WHERE} is int4, whose products a GPU has in bfloat16 only, but teacher.dtype is "
            f"{str(dtype).removeprefix('torch.')}: set teacher.dtype to bfloat16, or {_WHERE} to int8"
        )
    from torchao.quantization import Int4WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    packed = Int4PackingFormat.TILE_PACKED_TO_4D
    return Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=packed, set_inductor_config=False)


def _int4_of_cpus() -> Any:
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError as error:  # what is a prototype may be elsewhere, or nowhere, in the next release
        raise ModelError(
            f"{_WHERE} is int4, which the installed torchao does not have for a CPU ({error}): set it to int8, or "
            "pip install torchao==0.18.0"
        ) from error
    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def quantization_method(model: nn.Module) -> str:
    """How the weights of a loaded model are quantised, as Transformers names it; "" where they are not."""
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method) or "")


def check_quantised(model: PreTrainedModel, quantization: str | Mapping[str, Any]) -> None:
    """Say how many weights of a loaded teacher are quantised.

    Raises:
        ModelError: none is, as in models whose layers are no `torch.nn.Linear`.
    """
    head = model.get_output_embeddings()
    linear = {module for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    quantised = [module for module in linear if _is_packed(module.weight)]
    if not quantised:
        raise ModelError(
            f"{_WHERE} {_named(quantization)} quantises nothing in {type(model).__name__}: of its {len(linear)} linear "
            "layers besides the head none is of a kind or size that it takes; leave it out"
        )
    held = sum(part.nbytes for parameter in model.parameters() for part in inner_tensors(parameter))
    logger.info(
        "%s: %s, %d of %d linear layers besides the head; the teacher takes %.1f MiB",
        *(_WHERE, _named(quantization), len(quantised), len(linear), held / 2**20),
    )


def refuse_quantised_student(model: nn.Module, where: str) -> None:
    """Raise ModelError for a student whose weights came quantised: what is trained are fp32 weights."""
    if method := quantization_method(model):
        raise ModelError(
            f"{where}: its weights are quantised ({method}), and a student is trained in fp32: name a checkpoint that "
            "is not quantised"
        )


def _named(quantization: str | Mapping[str, Any]) -> str:
    return quantization if isinstance(quantization, str) else method_of(quantization)


def _is_packed(weight: Tensor) -> bool:
    in_package = type(weight).__module__.startswith("bitsandbytes")
    return is_wrapper_subclass(weight) or in_package or not weight.is_floating_point()
