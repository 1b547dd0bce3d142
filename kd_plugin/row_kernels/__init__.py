"""distill.row_kernel: one chunk's logits to statistics and gradient."""
