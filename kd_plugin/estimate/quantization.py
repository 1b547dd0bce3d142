"""Bytes of quantised weights, and of optimizer states in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kd_plugin.settings.quantization import bits_of, method_of

__all__ = ["Packed", "adamw_bytes", "packed_as"]

_FLOAT, _HALF = 4, 2
# torchao.optim: states of fewer numbers, or of no multiple of a block, are not quantised
_BLOCK, _FEWEST, _CODES = 256, 4096, 256
_GROUP = {"torchao": 128, "bitsandbytes": 64}  # numbers that share a scale in 4 bits


class Packed(NamedTuple):
    """How the linear layers of a teacher are quantised, besides its head."""

    name: str
    """Short name, or the method."""
    method: str
    bits: int | None
    """Of one number; None where nothing here knows it."""

    def num_bytes(self, rows: int, columns: int, item: int, device: str) -> float:
        """Bytes of a weight `[rows, columns]` with its scales, whose products are in a dtype of `item` bytes.

        In full precision where the bits are not known.
        """
        numel = rows * columns
        if self.bits == 8:
            return numel + rows * (_FLOAT if self.method == "bitsandbytes" else item + 1)  # scale, and torchao's zero
        if self.bits != 4:
            return numel * item
        if self.method == "bitsandbytes":
            return numel / 2 + -(-numel // _GROUP[self.method]) * _FLOAT
        if device == "cuda" and self.method == "torchao":  # padded for the tiles of its kernel
            rows, columns, item = -(-rows // 8) * 8, -(-columns // 1024) * 1024, _HALF
        return rows * columns / 2 + rows * columns / _GROUP["torchao"] * 2 * item


def packed_as(quantization: str | Mapping[str, Any]) -> Packed:
    """What `teacher.quantization`, or the `quantization_config` of a checkpoint, makes of the weights."""
    method = method_of(quantization)
    name = quantization if isinstance(quantization, str) else method
    bits = bits_of(quantization)
    if bits is None and not isinstance(quantization, str):
        bits = quantization.get("bits")  # of GPTQ and AWQ
    return Packed(name, method, bits)


def adamw_bytes(numel: int) -> float:
    """Bytes of both moments of `numel` numbers of one parameter on a rank, as `adamw_8bit` keeps them."""
    if numel < _FEWEST or numel % _BLOCK:
        return 2 * _FLOAT * numel
    return 2 * (numel + numel / _BLOCK * _FLOAT + _CODES * _FLOAT)
