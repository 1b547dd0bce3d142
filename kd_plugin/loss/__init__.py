"""Hidden states or logits to loss and gradients, in chunks."""
