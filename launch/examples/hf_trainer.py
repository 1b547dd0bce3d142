"""Distil with the Hugging Face Trainer: python, torchrun or accelerate launch THIS_FILE [OUTPUT_DIR]"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import kd_plugin as kd
from kd_plugin.hf import DistillTrainer


def tiny(layers: int) -> LlamaForCausalLM:
    """A random model; AutoModelForCausalLM.from_pretrained(...) in earnest."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


torch.manual_seed(0)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (56, 16))]
args = TrainingArguments(
    output_dir=sys.argv[1] if len(sys.argv) > 1 else "runs/hf_trainer",
    max_steps=3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=3,
    report_to="tensorboard",
)
trainer = DistillTrainer(
    model=tiny(1),
    teacher=tiny(2),  # or its name: "meta-llama/..."
    distill=kd.DistillConfig(divergence="forward_kl", temperature=2.0),
    args=args,
    train_dataset=rows[8:],
    eval_dataset=rows[:8],
)
trainer.train()
