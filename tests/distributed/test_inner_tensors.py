"""Tensors that are made of others are taken apart."""

from __future__ import annotations

import torch
from torch.testing._internal.two_tensor import TwoTensor

from kd_plugin.distributed.torch_internals import inner_tensors


def test_a_tensor_of_others_is_taken_apart() -> None:
    plain, other = torch.zeros(2), torch.ones(2)
    pair = TwoTensor(plain, TwoTensor(other, plain))
    assert inner_tensors(plain) == [plain]
    assert [id(part) for part in inner_tensors(pair)] == [id(plain), id(other), id(plain)]
