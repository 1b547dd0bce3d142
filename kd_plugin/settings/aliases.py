"""What other trainers call a setting or a value, for the suggestion behind one that is not known here."""

from __future__ import annotations

__all__ = ["DIVERGENCES", "KEYS", "VALUES"]

KEYS = {
    "lr": "train.learning_rate",
    "max_lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "iterations": "train.max_steps",
    "batch_size": "train.micro_batch_size",
    "train_batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_eval_batch_size": "train.eval_micro_batch_size",
    "eval_batch_size": "train.eval_micro_batch_size",
    "global_batch_size": "train.tokens_per_step",
    "accumulation_steps": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "warmup": "train.warmup_steps",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "optim": "train.optimizer",
    "betas": "train.adam_betas",
    "wd": "train.weight_decay",
    "clip_grad": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "gradient_checkpointing": "train.activation_checkpointing",
    "torch_compile": "train.compile",
    "early_stopping": "train.stop_on",
    "load_best_model_at_end": "train.export_best",
    "metric_for_best_model": "train.export_best",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "train.eval_every",
    "logging_steps": "log.every",
    "wandb": "log.report_to",
    "trackio": "log.report_to",
    "mlflow": "log.report_to",
    "output": "log.output_dir",
    "save_dir": "log.output_dir",
    "kl": "distill.divergence",
    "loss": "distill.divergence",
    "kd_loss": "distill.divergence",
    "kd_temperature": "distill.temperature",
    "ce_weight": "distill.hard_weight",
    "kd_weight": "distill.soft_weight",
    "kl_weight": "distill.soft_weight",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "sequence_len": "data.seq_len",
    "load_in_8bit": "teacher.quantization",
    "load_in_4bit": "teacher.quantization",
    "quantization_config": "teacher.quantization",
    "quantization_bit": "teacher.quantization",
    "teacher_model": "teacher.model",
    "student_model": "student.model",
    "model_name_or_path": "student.model",
    "bf16": "student.dtype",
    "fp16": "student.dtype",
    "torch_dtype": "student.dtype",
}
"""Other name -> section and key here."""

DIVERGENCES = {
    "kl": "forward_kl",
    "kld": "forward_kl",
    "kl_div": "forward_kl",
    "fkl": "forward_kl",
    "forward": "forward_kl",
    "rkl": "reverse_kl",
    "reverse": "reverse_kl",
    "js": "jsd",
    "gkd": "jsd",
    "generalized_jsd": "jsd",
    "skl": "skew_kl",
    "srkl": "skew_reverse_kl",
    "ce": "soft_ce",
    "cross_entropy": "soft_ce",
    "tv": "tvd",
    "total_variation": "tvd",
    "mse": "logit_mse",
}
"""Other name -> divergence here."""

_EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit_bnb", "adamw_torch_8bit", "paged_adamw_8bit", "adamw8bit", "adam_8bit")

VALUES = {
    "train.optimizer": {
        **dict.fromkeys(_EIGHT_BIT, "adamw_8bit"),
        "adamw_torch_fused": "adamw_fused",
        "fused_adamw": "adamw_fused",
        **dict.fromkeys(("adamw_torch", "adamw_hf", "adam", "paged_adamw"), "adamw"),
    },
    "teacher.quantization": {
        **dict.fromkeys(("8bit", "8-bit", "load_in_8bit", "bnb_8bit", "llm.int8"), "bitsandbytes_8bit"),
        **dict.fromkeys(("4bit", "4-bit", "load_in_4bit", "bnb_4bit", "nf4"), "bitsandbytes_4bit"),
        **dict.fromkeys(("int8_weight_only", "torchao_int8", "torchao_int8_weight_only"), "int8"),
        **dict.fromkeys(("int4_weight_only", "torchao_int4", "torchao_int4_weight_only"), "int4"),
    },
}
"""Section and key here -> what other trainers write there -> the value here."""
