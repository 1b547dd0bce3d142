"""Versions and devices of this machine, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys

__all__ = ["describe_environment"]

_PACKAGES = (
    "kd-plugin",
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "peft",
    "gguf",
    "numpy",
    "pydantic",
    "omegaconf",
    "typer",
    "tensorboard",
)


def describe_environment() -> dict[str, str]:
    """What a bug report should name: versions, devices, communication backends, compiler."""
    import torch

    about = {"python": sys.version.split()[0], "platform": platform.platform()}
    about |= {name: _version(name) for name in _PACKAGES}
    about["torch"] = str(torch.__version__)  # with its build (+cu130), which the metadata on PyPI leave out
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    about["devices"] = ", ".join(devices) or "CPU only"
    about["cpu threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    about["cuda"] = str(torch.version.cuda or torch.version.hip or "not built in")
    about["gloo"] = _yes(torch.distributed.is_available() and torch.distributed.is_gloo_available())
    about["nccl"] = _yes(torch.distributed.is_available() and torch.distributed.is_nccl_available())
    about["c++ compiler"] = shutil.which(os.environ.get("CXX", "g++")) or "none found"
    return about


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _yes(available: bool) -> str:
    return "available" if available else "not available"
