"""Small models of any class: its configuration, shrunk field by field, and weights that no symmetry hides.

The fields of a configuration class are read from its own defaults, so a class that is added tomorrow is shrunk by
the same tables. What one class needs besides stands in `parts` and `special`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import torch
from torch import nn

from tests.sweep.classes import model_class
from tests.sweep.parts import PARTS
from tests.sweep.special import CLASSES

VOCAB = 120
FIRST_SPECIAL = 96
LARGEST = 3_000_000
"""Ids from here on are the special tokens of the configurations; texts are drawn below."""

# Exact names first. A default that is larger becomes this; a bool or a float becomes it in any case.
# fmt: off
FIELDS: dict[str, Any] = {
    "head_dim": 8,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "depth": 2, "layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "max_window_layers": 1,
    "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "d_inner": 48,
    "dff": 48, "dim_ff": 48, "hidden_dim": 48, "ffn_hidden_size": 48, "intermediate_size_mlp": 48, "mlp_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "shared_experts_intermediate_size": 16, "dense_intermediate_size": 48, "share_expert_dim": 16,
    "moe_hidden_size": 32, "feed_forward_size": 48, "shared_intermediate_size": 16,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "d_kv": 8, "d_head": 8, "dim_head": 8, "kv_channels": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8, "index_head_dim": 8, "index_n_heads": 2,
    "index_topk": 4, "rotary_dim": 4, "attention_head_size": 8,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "expert_capacity": 64, "moe_top_k": 2,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_chunk_size": 8, "state_size": 8, "chunk_size": 8,
    "num_codebooks": 2, "num_query_tokens": 4,
    # what is done to logits; on, and not 1
    "logit_scale": 0.3, "logits_scaling": 3.0, "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0, "lm_head_multiplier": 0.4, "output_multiplier": 0.35,
    "logits_mup_width_multiplier": 2.5, "dim_model_base": 20,
    # and what is added to the loss
    "output_router_logits": True, "router_aux_loss_coef": 0.3, "aux_loss_coef": 0.3, "router_z_loss_coef": 0.2,
    "lm_head_bias": True,
    # and what is drawn at random in training
    "apply_spec_augment": False, "mask_time_prob": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}
# fmt: on

# Fields whose None means "derive it", which not every class does.
SET_WHERE_NONE = {"head_dim", "num_key_value_heads", "final_logit_softcapping", "logit_scale"}

# Then names like these, for an int that is larger.
PATTERNS: list[tuple[str, int]] = [
    (r"vocab", VOCAB),
    (r"(^|_)(num_)?(hidden_)?layers$|_layers_|^depth|_depth$", 2),
    (r"(attention|_)heads$|^num_heads", 4),
    (r"(intermediate|ffn|feed_forward).*(size|dim)$", 48),
    (r"lora_rank$|_rank$", 8),
    (r"hidden_size|hidden_dim|embed_dim|embedding_size|embed_size|d_model|^n_embd$|projection_dim|^dim$|emb_dim$", 32),
    (r"(output|input|proj|out|in)_dim(s)?$|_width$|hidden_size$", 32),
    (r"head_dim$", 8),
    (r"experts$", 4),
    (r"max.*position", 128),
    (r"output_channels$|num_filters$|^d_latents$|channel$|_groups$", 32),
]

# And lists of ints, one for each stage.
LISTS: list[tuple[str, int]] = [
    (r"conv_dim$|channels$|hidden_sizes$|embed_dim$|tdnn_dim$", 32),
    (r"^num_heads$|^num_groups$", 4),
    (r"^depths$", 1),
]

_ID = re.compile(r"(_id|_index|_idx|_token_ids)$|^(image|video|audio|begin|end)_.*_(id|index)$")
_NOT_AN_ID = re.compile(r"ignore_index|active_idx|layer|num_labels|block_index|lang_id$")
_FEW_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


class _Ids:
    """Ids of special tokens by field name, the same all over one configuration."""

    def __init__(self) -> None:
        self._by_name: dict[str, int] = {}

    def of(self, name: str) -> int:
        if name in _FEW_TOKENS:
            return _FEW_TOKENS[name]
        name = re.sub(r"_(id|index|idx)$", "", name)
        return self._by_name.setdefault(name, FIRST_SPECIAL + len(self._by_name) % (VOCAB - FIRST_SPECIAL))


def _shrunk_value(name: str, value: Any, ids: _Ids) -> Any:
    """The small value of a field whose default is `value`, or the default itself."""
    if _ID.search(name) and not _NOT_AN_ID.search(name):
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return ids.of(name)
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            return [ids.of(name)]
        return value
    if "dropout" in name or name.endswith(("pdrop", "layerdrop", "drop_path_rate")):
        return 0.0 if isinstance(value, float) else value
    if name == "vocab_size":
        return VOCAB
    if name in FIELDS:
        small = FIELDS[name]
        if isinstance(value, str | list | tuple | dict) or isinstance(value, bool) != isinstance(small, bool):
            return value
        if isinstance(small, int) and not isinstance(small, bool) and isinstance(value, int):
            return min(small, value) if value > 0 else value
        return small
    patterns = LISTS if isinstance(value, list | tuple) else PATTERNS
    for pattern, small in patterns:
        if re.search(pattern, name):
            return _at_most(value, small)
    return value


def _at_most(value: Any, small: int) -> Any:
    if isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return [min(v, small) for v in value]
    return min(value, small) if isinstance(value, int) and not isinstance(value, bool) else value


def small_config(config_class: Any, changes: dict[str, Any] | None = None, ids: _Ids | None = None) -> Any:
    """A configuration of that class, shrunk, with `changes` (dotted names reach into parts of it)."""
    ids = _Ids() if ids is None else ids
    changes = dict(changes or {})
    specs = getattr(config_class, "sub_configs_defaults", {})
    settings: dict[str, Any] = {}
    for name, value in config_class.default_config_fields().items():
        if name in specs:
            inner = {k[len(name) + 1 :]: changes.pop(k) for k in list(changes) if k.startswith(f"{name}.")}
            if name in changes:
                continue
            if value is not None or inner:
                settings[name] = _small_part(specs[name], inner, ids)
        elif (small := _shrunk_value(name, value, ids)) is not value:
            settings[name] = small
    for field in dataclasses.fields(config_class):
        if field.name in SET_WHERE_NONE and field.default is None and field.name not in settings:
            settings[field.name] = FIELDS[field.name]
    if "kv_lora_rank" in settings:  # latent attention has as many of both
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return config_class(**{**settings, **PARTS.get(config_class.__name__, {}), **changes})


def _small_part(spec: Any, changes: dict[str, Any], ids: _Ids) -> Any:
    from transformers import PreTrainedConfig

    kind = changes.pop("model_type", spec.model_type)
    own = issubclass(spec.config_class, PreTrainedConfig)
    part = spec.config_class if own else spec.get_config_class(kind)
    known = part.default_config_fields()
    start = {k: _shrunk_value(k, v, ids) for k, v in spec.init_kwargs.items() if k in known and not isinstance(v, dict)}
    for name, value in spec.init_kwargs.items():
        if isinstance(value, dict) and "model_type" in value:  # of the part's own parts, their kind is kept
            start[f"{name}.model_type"] = value["model_type"]
    return small_config(part, {**start, **changes}, ids)


def small_model(name: str, seed: int, changes: dict[str, Any] | None = None) -> nn.Module:
    """A small model of the class `name`, float32, in evaluation mode; in training mode it drops nothing either."""
    kind = model_class(name)
    config = small_config(kind.config_class, {**CLASSES.get(name, {}), **(changes or {})})
    if (size := _parameters(kind, config)) > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters: shrink its configuration")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if config.is_encoder_decoder and not hasattr(config, "decoder_start_token_id"):
            config.decoder_start_token_id = FIRST_SPECIAL + 11  # T5 has it in its checkpoints only
        model = kind(config)
        scramble(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.float().eval()


def _parameters(kind: Any, config: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())


def scramble(model: nn.Module) -> None:
    """Move every parameter off its initial value, zeros and ones included, and the logits' bias buffers too."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            width = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=width)
        for name, buffer in model.named_buffers():
            if name.endswith("final_logits_bias"):
                buffer.normal_()
