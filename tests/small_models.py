"""Six-layer random models of the architectures that students are cut from."""

from __future__ import annotations

import pytest
import torch

from kd_plugin.settings.run import StudentConfig

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=48, n_embd=16, n_layer=6, n_head=4, n_positions=64),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=4, layer_types=[*KINDS, "full_attention"]
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16,
    ),
}  # fmt: skip


def make_teacher(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # biases and norms start at constants, which would hide a layer taken for another
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 48, (batch, length), generator=torch.Generator().manual_seed(1))


def from_teacher(layers: int, **values: object) -> StudentConfig:
    return StudentConfig(from_teacher={"layers": layers}, **values)


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers
