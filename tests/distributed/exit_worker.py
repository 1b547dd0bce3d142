"""Ends right after a collective: `exit_worker.py library|torch`, by what ends the process group.

`late_gloo.c` is preloaded. The interpreter is held by the handler that is called last, so registered first.
"""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import ctypes

atexit.register(ctypes.PyDLL(None).hold_interpreter)

import sys
from typing import Any

import torch.distributed as dist

from kd_plugin.engine import start_process_group

kept: list[Any] = []


def main(ending: str) -> None:
    place = start_process_group(60)
    kept.append(dist.group.WORLD)  # as DTensor's caches keep the groups of FSDP2's meshes
    dist.all_gather_object([None] * place.world_size, place.rank)
    if ending == "library":
        place.close()
    else:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
