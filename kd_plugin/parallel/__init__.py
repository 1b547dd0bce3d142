"""How student and teacher are cut over the ranks: FSDP2 units and DeepSpeed configurations."""
