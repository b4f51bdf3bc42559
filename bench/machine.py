"""What a bench says about where it ran: the machine and the commit, for its JSON line."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def machine(threads: int | None = None) -> dict[str, str | int | None]:
    """`cpu, gpu, threads, torch, triton`; gpu and triton None where there is none; threads: torch's unless given."""
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def cpu_name() -> str:
    """The processor's model name; its architecture where the system does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Short hash of the checkout that this file is in, `-dirty` with uncommitted changes; None outside git."""
    folder = Path(__file__).resolve().parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or None
