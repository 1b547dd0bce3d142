"""Tiny random models of many architectures, whose losses are compared with those of their own logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import kd_plugin as kd
from tests import oracle

VOCAB = 61
WIDTH = 32
LAYER_TYPES = ["sliding_attention", "full_attention"]

# By every name that some configuration has for it; each takes those that it knows.
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HIDDEN = ("hidden_size", "d_model")
FEED_FORWARD = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
# The usual 0.02 gives logits so small that soft-caps do not bend them and temperatures do not matter.
INITIAL = dict.fromkeys(("initializer_range", "init_std"), 0.2)
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "dropout_rate", "embd_pdrop", "attn_pdrop")
DROPOUTS += ("resid_pdrop",)

# name -> (model class, settings besides width, vocabulary and SIZES)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3_tied": ("Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8, "layer_types": LAYER_TYPES},
    ),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 4.0}),
    "opt": ("OPTForCausalLM", {"word_embed_proj_dim": 16}),  # in the wider models projections around the layers
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 3.0}),
    "phi": ("PhiForCausalLM", {"num_attention_heads": 2, "num_key_value_heads": 2}),  # its head has a bias
    "bart": ("BartForConditionalGeneration", {}),
    "t5": ("T5ForConditionalGeneration", {"d_kv": 8, "decoder_start_token_id": 0}),
}
# Those that keep positions from their masks
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": (
        "GptOssForCausalLM",
        {"head_dim": 8, "sliding_window": 8, "layer_types": LAYER_TYPES, "num_local_experts": 4}
        | {"num_experts_per_tok": 2, "attn_implementation": "eager"},
    ),
    "falcon": ("FalconForCausalLM", {"alibi": False}),
    "bloom": ("BloomForCausalLM", {"n_layer": 2, "n_head": 4, "attn_implementation": "eager"}),
    "mpt": (
        "MptForCausalLM",
        {"n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2, "attn_implementation": "eager"},
    ),
}
TIED = ("llama_tied", "qwen3_tied", "cohere", "gpt2", "gemma2", "gemma3", "opt", "bart", "t5")
ENCODER_DECODERS = ("bart", "t5")


def known_settings(model_class: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings` that the configuration of `model_class` has, under one of its names for them."""
    config = getattr(transformers, model_class).config_class
    names = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    return {name: value for name, value in settings.items() if name in names}


def make_model(
    name: str,
    *,
    width: int = WIDTH,
    vocab_size: int = VOCAB,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    **settings: Any,
) -> nn.Module:
    """A random model in eval mode, with logits large enough that soft-caps bend them and temperatures matter.

    Args:
        name: of `ARCHITECTURES` or `OTHERS`, or a class of transformers.
        width: of the hidden states; the feed-forward layers have twice that.
        dropout: of every kind that the architecture has.
        settings: of its configuration, over those of the table.
    """
    model_class, defaults = (ARCHITECTURES | OTHERS).get(name, (name, {}))
    sizes = {**SIZES, **INITIAL, **dict.fromkeys(HIDDEN, width), **dict.fromkeys(FEED_FORWARD, 2 * width)}
    sizes |= {**dict.fromkeys(DROPOUTS, dropout), "vocab_size": vocab_size}
    sizes = known_settings(model_class, sizes)
    kind = getattr(transformers, model_class)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(kind.config_class(**{**sizes, **defaults, **settings}))
        biases = [getattr(model.get_output_embeddings(), "bias", None), getattr(model, "final_logits_bias", None)]
        for bias in (bias for bias in biases if bias is not None):  # zero, which would test nothing
            nn.init.normal_(bias)
    return model.to(dtype).eval()


def with_changed_logits(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """`model`, with its logits changed after the head."""
    forward = model.forward

    def changed_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed_forward
    return model


def make_batch(seed: int = 0, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """`input_ids` and `labels`, some of them masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, 3] = labels[0, 4] = labels[-1, -1] = -100
    return {"input_ids": ids, "labels": labels}


def expected_loss(
    student: nn.Module, teacher: nn.Module | None, batch: dict[str, Tensor], config: kd.DistillConfig
) -> oracle.Expected:
    """The loss of both models' own logits, before anything is attached."""

    def logits(model: nn.Module) -> Tensor:
        return model(**batch).logits

    students, labels = logits(student), batch["labels"]
    teachers = None
    if teacher is not None:
        with torch.no_grad():
            teachers = logits(teacher)
    if not student.config.is_encoder_decoder:
        students, labels = students[:, :-1], labels[:, 1:]
        teachers = None if teachers is None else teachers[:, :-1]
    teachers = None if teachers is None else teachers.reshape(-1, teachers.shape[-1])
    return oracle.distill_logits(students.reshape(-1, students.shape[-1]), teachers, labels.reshape(-1), config)


def gradients_of(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """By parameter name, of those that the loss reaches."""
    model.zero_grad(set_to_none=True)
    loss().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest gradient of all."""
    assert found.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    assert largest > 0
    for name in wanted:
        assert float((found[name] - wanted[name]).abs().max()) <= tolerance * largest, name
