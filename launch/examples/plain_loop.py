"""Distil in a loop of your own: attach, and train on `loss` as before."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kd_plugin as kd


def tiny(layers: int) -> LlamaForCausalLM:
    """A random model; AutoModelForCausalLM.from_pretrained(...) in earnest."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


torch.manual_seed(0)
student, teacher = tiny(1), tiny(2)
config = kd.DistillConfig(divergence="forward_kl", temperature=2.0, soft_weight=0.5, hard_weight=0.5)
plugin = kd.attach(student, teacher, config)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

for step in range(3):
    micro_batches = [torch.randint(64, (2, 16)) for _ in range(4)]
    num_items = sum(ids[:, 1:].numel() for ids in micro_batches)  # valid tokens of the whole step
    for ids in micro_batches:
        student(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    numbers = plugin.metrics()
    print(f"step {step}: " + " ".join(f"{name} {numbers[name]:.4f}" for name in ("loss", "soft_loss", "hard_loss")))
