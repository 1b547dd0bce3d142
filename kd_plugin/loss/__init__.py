"""Hidden states or logits to loss and gradients, in chunks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules={"reference"})
