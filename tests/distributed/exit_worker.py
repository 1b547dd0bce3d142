"""Ends right after a collective: `exit_worker.py library|torch`, by what ends the process group."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from kd_plugin.engine import start_process_group


class SlowToEnd:
    """Keeps an ending interpreter busy for a second, as that of a large program is."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(1.0)


kept: list[Any] = []


def main(ending: str) -> None:
    place = start_process_group(60)
    kept.extend([SlowToEnd(), dist.group.WORLD])  # as DTensor's caches keep the groups of FSDP2's meshes
    dist.all_gather_object([None] * place.world_size, place.rank)
    if ending == "library":
        place.close()
    else:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
