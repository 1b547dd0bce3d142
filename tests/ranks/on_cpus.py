"""Runs a script on CPU ranks as `accelerate launch` runs it on GPUs: python on_cpus.py SCRIPT [ARGUMENTS].

accelerate starts ranks on CPUs with MPI alone, and knows neither FSDP nor DeepSpeed there. Replaced is what a rank
takes itself for: it joins a gloo group on its CPU, for FSDP under the name that a rank with a GPU has. What the
launcher has configured and all that follows is accelerate's own.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType

from kd_plugin.distributed.collectives import end_process_groups

plain = accelerate.state.PartialState.__init__


def on_cpu(self: accelerate.state.PartialState, cpu: bool = False, **kwargs: Any) -> None:
    first = not self._shared_state
    plain(self, cpu=True, **{**kwargs, "backend": "gloo"})
    if first and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        self._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    accelerate.state.PartialState.__init__ = on_cpu  # type: ignore[method-assign]
    torch.compiler.set_stance("force_eager")  # compiling takes longer than all the rest
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    end_process_groups()
