"""Distil on what the student writes, with TRL's DistillationTrainer: THIS_FILE [OUTPUT_DIR]"""

import sys

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

import kd_plugin as kd
from kd_plugin.hf import DistillOnPolicyMixin


class OnPolicyTrainer(DistillOnPolicyMixin, DistillationTrainer):
    """TRL generates, and any divergence of kd_plugin compares; before trl.experimental.gkd.GKDTrainer likewise."""


WORDS = ["<pad>", "</s>", *"what is the sum of one and two three four five six".split()]
core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}

torch.manual_seed(0)
prompts = [{"prompt": f"what is the sum of {a} and {b}"} for a in WORDS[7:] for b in WORDS[7:]]
folder = sys.argv[1] if len(sys.argv) > 1 else "runs/trl_on_policy"
trainer = OnPolicyTrainer(
    model=LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)),
    teacher=LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)),
    distill=kd.DistillConfig(divergence="reverse_kl", soft_weight=1.0, hard_weight=0.0),
    args=DistillationConfig(folder, max_steps=3, logging_steps=1, max_completion_length=6, bf16=False),
    train_dataset=datasets.Dataset.from_list(prompts),
    processing_class=tokenizer,
)
trainer.train()
