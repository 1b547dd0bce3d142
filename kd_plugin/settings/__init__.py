"""Every setting of a run; nothing here imports torch."""
