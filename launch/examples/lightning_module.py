"""Distil in a module of Lightning's: python THIS_FILE"""

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kd_plugin as kd


def tiny(layers: int) -> LlamaForCausalLM:
    """A random model; AutoModelForCausalLM.from_pretrained(...) in earnest."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


class Distilled(lightning.LightningModule):
    """Its submodule is the student; the teacher is the plugin's alone, so that no checkpoint holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = tiny(1)
        self.plugin = kd.attach(self.student, tiny(2), kd.DistillConfig(temperature=2.0))

    def on_fit_start(self) -> None:
        self.plugin.teacher.to(self.device)

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.student(input_ids=ids, labels=ids).loss
        self.log_dict(numbers := self.plugin.metrics())
        self.print(" ".join(f"{name} {numbers[name]:.4f}" for name in ("loss", "soft_loss", "hard_loss")))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)


lightning.seed_everything(0)
data = torch.utils.data.DataLoader(torch.randint(64, (12, 16)), batch_size=4)
trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Distilled(), data)
