"""Peak memory of this process."""

from __future__ import annotations

import torch

from kd_plugin.settings.units import GIB


def memory_readings() -> dict[str, float]:
    """Peak memory of this process in GiB: what the CUDA allocator handed out and reserved, or resident memory."""
    if torch.cuda.is_available():
        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes, macOS bytes
    return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
