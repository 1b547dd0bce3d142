"""The Hugging Face Trainer and its subclasses, TRL's among them, with a teacher.

The public names are those of `__init__.pyi`, resolved on first use: importing this imports no library.

The modules by subject:

- the trainers: `trainer`, `on_policy`
- what they are made of: `teacher` (loading and placing it), `batches` (labels and inputs), `logged`, `refusals`
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
