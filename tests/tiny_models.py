"""Tiny random models of many architectures, whose losses are compared with those of their own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kd_plugin as kd
from tests import oracle

VOCAB = 61
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 32}
GROUPED = {**HEADS, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2, "hidden_size": 32}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {**HEADS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 16}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}

# name -> (configuration class, settings)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gpt2": ("GPT2Config", GPT2),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "final_logit_softcapping": 4.0}),
    "opt": ("OPTConfig", OPT),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 3.0}),
    "phi": ("PhiConfig", {**GROUPED, "num_key_value_heads": 4}),  # its head has a bias
    "bart": ("BartConfig", BART),
    "t5": ("T5Config", T5),
}
TIED = ("llama_tied", "cohere", "gpt2", "gemma2", "gemma3", "opt", "bart", "t5")
ENCODER_DECODERS = ("bart", "t5")


def make_model(name: str, seed: int = 1, dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    """In eval mode, with logits large enough that soft-caps bend them and temperatures matter."""
    import transformers

    kind, defaults = ARCHITECTURES[name]
    merged = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **defaults, **settings}
    config = getattr(transformers, kind)(**merged)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config)
        with torch.no_grad():
            head = model.get_output_embeddings()
            # A tied head is also the embedding: 10 would saturate the softmaxes of T5 and BART, and OPT's
            # small initial weights need more for its two models to differ at all.
            head.weight.mul_({"t5": 2, "bart": 2, "opt": 60}.get(name, 10))
            if head.bias is not None:
                head.bias.normal_()
            if "final_logits_bias" in dict(model.named_buffers()):
                model.final_logits_bias.normal_()
    return model.to(dtype).eval()


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
