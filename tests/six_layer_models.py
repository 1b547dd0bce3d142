"""Random teachers of six layers, from which students are cut."""

from __future__ import annotations

import torch

from kd_plugin.settings.run import StudentConfig
from tests.tiny_models import make_model

LAYERS, VOCAB = 6, 48
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # those of the vocabularies in files
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
# name of an architecture -> settings of a teacher whose layers are not all alike
TEACHERS: dict[str, dict[str, object]] = {
    "llama": {},
    "llama_tied": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {},
    "gpt2": {},
    "gemma2": {"sliding_window": 4, "layer_types": None},
    "gemma3": {"sliding_window": 4, "layer_types": [*KINDS, "full_attention"]},
    "opt": {"word_embed_proj_dim": 16},
}


def make_teacher(name: str) -> torch.nn.Module:
    settings = {"num_hidden_layers": LAYERS, **TOKENS, **TEACHERS[name]}
    model = make_model(name, width=16, vocab_size=VOCAB, seed=0, dtype=torch.float32, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases and norms start at constants, which would hide a layer taken for another
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def from_teacher(layers: int, **values: object) -> StudentConfig:
    return StudentConfig(from_teacher={"layers": layers}, **values)


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers
