"""Distil in a loop of accelerate's, under whatever it is configured for: accelerate launch THIS_FILE"""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import kd_plugin as kd
from kd_plugin.hf import place_teacher

ACCUMULATION = 4


def tiny(layers: int) -> LlamaForCausalLM:
    """A random model; AutoModelForCausalLM.from_pretrained(...) in earnest."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
student, teacher = tiny(1), tiny(2)
plugin = kd.attach(student, teacher, kd.DistillConfig(temperature=2.0))  # before prepare
plugin.teacher = place_teacher(teacher, accelerator)  # sharded as accelerate shards the student
data = torch.utils.data.DataLoader(torch.randint(64, (48, 16)), batch_size=2)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
model, optimizer, data = accelerator.prepare(student, optimizer, data)

for ids in data:
    with accelerator.accumulate(model):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        numbers = plugin.metrics()
        accelerator.print(" ".join(f"{name} {numbers[name]:.4f}" for name in ("loss", "soft_loss", "hard_loss")))
accelerator.end_training()
