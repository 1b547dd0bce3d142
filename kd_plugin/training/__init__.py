"""kd.train: preflight, loop, checkpoints, export, report, TensorBoard."""
