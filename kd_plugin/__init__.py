"""kd_plugin: attach a teacher to a student and train under DeepSpeed or FSDP as before.

The public names are those of `__init__.pyi`. They are resolved on first use, so that `kd-plugin validate` answers
without importing torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
