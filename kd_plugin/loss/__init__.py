"""Hidden states or logits to loss and gradients, in chunks."""

import lazy_loader

# `kd_plugin.reference` is an attribute of this package, whose module is imported on first use
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submodules={"reference"})
