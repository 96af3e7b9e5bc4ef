"""Where a figure comes from: source, versions, hardware, memory, weights."""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision

from extras import datasets

ROOT = Path(__file__).parent.parent


def sha256(file):
    """Hexadecimal digest of a file, None for no file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def git_commit():
    """HEAD of the project's repository, -dirty where files differ from it; None without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# Taken when imported: what is edited later is not what ran.
SOURCE = {"commit": git_commit(), "ham_sha256": sha256(ROOT / "ham.py")}


def peak_memory(device):
    """Bytes, of the GPU's allocator or of the process; None where the system does not tell."""
    if "cuda" in device:
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource  # does not exist on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def environment(c):
    """The part of results.json that the figures depend on beside the configuration."""
    modules = (torch, torchvision, timm, np)
    cuda = "cuda" in c.device
    name = torch.cuda.get_device_name(c.device) if cuda else platform.machine()
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}
    return SOURCE | {
        "versions": versions,
        "hardware": f"{name}, {torch.get_num_threads()} threads",
        "peak_memory_bytes": peak_memory(c.device),
        "weights_sha256": sha256(c.weights),
        "split_sha256": sha256(datasets.split_file(c)),
    }
