"""Train with DeepSpeed, ZeRO stage 0 to 3.

deepspeed --num_gpus 2 launch/train_deepspeed.py configs/smollm2_135m_to_8l_zero3.yaml [section.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kd_plugin.cli.launcher import launch


def main(argv: Sequence[str]) -> int:
    """Train as `argv` says, with `train.parallel: deepspeed`; returns the exit code."""
    return launch(argv, script="launch/train_deepspeed.py", default="deepspeed", allowed=("deepspeed",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
