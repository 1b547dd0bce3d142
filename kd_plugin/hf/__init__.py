"""The Hugging Face Trainer and its subclasses, TRL's among them, with a teacher.

The public names are those of `__init__.pyi`, resolved on first use: importing this imports no library.

The modules by subject:

- the trainers: `trainer`, `on_policy`
- what they are made of: `teacher` (loading and placing it), `batches` (labels and inputs), `logged`,
  `tracking` (TensorBoard), `refusals`
"""

from typing import Any

import lazy_loader

from kd_plugin.settings.extras import require

_resolved, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A public name, on its first use.

    Raises:
        ImportError: a library is missing; the message has the pip command that brings it.
    """
    if name in __all__:
        for package in ("transformers", "accelerate"):
            require(package, f"kd_plugin.hf.{name} needs it")
    return _resolved(name)
