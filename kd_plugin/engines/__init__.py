"""FSDP2, FSDP1 and DeepSpeed behind one protocol."""
