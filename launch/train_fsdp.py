"""Train with FSDP2, FSDP1, DDP or one process.

torchrun --nproc-per-node 2 launch/train_fsdp.py configs/smollm2_135m_to_8l_fsdp2.yaml [section.key=value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kd_plugin.cli.launcher import launch


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says; returns the exit code. `train.parallel: auto` means fsdp on several ranks."""
    several_ranks = int(os.environ.get("WORLD_SIZE", 1)) > 1
    default = "fsdp" if several_ranks else "single"
    return launch(argv, script="launch/train_fsdp.py", default=default, allowed=("single", "ddp", "fsdp", "fsdp1"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
