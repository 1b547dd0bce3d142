"""kd.attach: a student bound to its teacher.

The modules by subject:

- one step: `attach`, `arguments`, `student_side`, `teacher_side`, `teacher_inputs`, `teacher_ahead`, `both_heads`,
  `model_output`, `router_loss`
- documents of a packed sequence: `isolation`
- the head: `head`, `student_head`, `plain_head`, `lora`, `causal_lm`, `replaced_forward`
- labels and tokens: `label_reader`, `labels`, `label_table`, `soft_rows`, `token_ids`, `tokenizers`
- what a model does to its logits and labels: `probe`, `probe_batch`, `logit_probe`, `second_look`, `undisturbed`
- safeguards while training: `loss_watch`, `state_watch`, `trainers`, `wrappers`
- numbers: `metrics`
"""
