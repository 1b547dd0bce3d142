"""Tiny random mixtures of experts of the installed Transformers, whose router losses weigh enough to be seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_models import known_settings, make_model

VOCAB = 53
COEFFICIENT = 0.5
EXPERTS = {
    "intermediate_size": 24,
    "d_ff": 24,
    "d_kv": 8,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "router_aux_loss_coef": COEFFICIENT,
    "aux_loss_coef": COEFFICIENT,
    "output_router_logits": True,
    # As by default: with logits as wide as those of the other tiny models the router losses would weigh nothing
    "initializer_range": 0.02,
}
_SWITCH = {
    "decoder_start_token_id": 1,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_decoder_layers": 2,
    "router_z_loss_coef": 0.1,
    "dropout_rate": 0.0,
}
_NLLB = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "decoder_start_token_id": 1,
    "expert_capacity": 64,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "moe_token_dropout"), 0.0),
    **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "router_jitter_noise"), 0.0),
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# Model class -> what its configuration wants besides EXPERTS.
MIXTURES: dict[str, dict[str, Any]] = {
    "DbrxForCausalLM": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "moe_loss_weight": COEFFICIENT},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    },
    "DogeForCausalLM": {"is_moe": True, "num_experts": 16},
    "Ernie4_5_MoeForCausalLM": {"moe_layer_start_index": 0},
    "FlexOlmoForCausalLM": {},
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "GraniteMoeHybridForCausalLM": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "GraniteMoeSWAForCausalLM": {},
    "GraniteMoeSharedForCausalLM": {},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "JetMoeForCausalLM": {"kv_channels": 8},
    "LagunaForCausalLM": {},
    "MellumForCausalLM": {},
    "MiniMaxForCausalLM": {},
    "MiniMaxM2ForCausalLM": {},
    "MixtralForCausalLM": {},
    "NllbMoeForConditionalGeneration": _NLLB,
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen3_5MoeForCausalLM": {"layer_types": ["linear_attention", "full_attention"]},
    "SwitchTransformersForConditionalGeneration": _SWITCH,
}


def make_mixture(name: str, seed: int = 1, *, vocab_size: int = VOCAB, **settings: Any) -> nn.Module:
    """A model of class `name` from transformers, fp32, without dropout; `settings` go over MIXTURES'."""
    settings = {**known_settings(name, EXPERTS), **MIXTURES[name], **settings}
    return make_model(name, vocab_size=vocab_size, seed=seed, dtype=torch.float32, **settings)


def make_batch(seed: int = 0, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """`input_ids` and `labels`, the first few of each row masked, more of them the greater `seed`."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : 1 + seed % (length - 2)] = -100
    return {"input_ids": ids, "labels": labels}
