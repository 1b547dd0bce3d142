"""Distil with TRL's SFTTrainer: python, torchrun or accelerate launch THIS_FILE [OUTPUT_DIR]"""

import sys

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import kd_plugin as kd
from kd_plugin.hf import DistillTrainerMixin


class DistillSFTTrainer(DistillTrainerMixin, SFTTrainer):
    """SFTTrainer with a teacher."""


WORDS = ["<pad>", "</s>", *"what is the sum of one and two three four five six".split()]
core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}

torch.manual_seed(0)
pairs = [{"prompt": f"what is the sum of {a} and {b}", "completion": " three"} for a in WORDS[7:] for b in WORDS[7:]]
trainer = DistillSFTTrainer(
    model=LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)),
    teacher=LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)),
    distill=kd.DistillConfig(divergence="jsd", temperature=2.0, soft_weight=0.8, hard_weight=0.2),
    args=SFTConfig(sys.argv[1] if len(sys.argv) > 1 else "runs/trl_sft", max_steps=3, logging_steps=1, bf16=False),
    train_dataset=datasets.Dataset.from_list(pairs),
    processing_class=tokenizer,
)
trainer.train()
