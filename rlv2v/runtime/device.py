"""The device that torch uses: its choice, its memory, and copies to and from it that do not stop the host."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlv2v.errors import UserError, first_line


def pick_device(name: str) -> torch.device:
    """Return the named torch device ("cpu", "cuda", "cuda:1") after a try; "auto" is cuda if there is one.

    Raises:
        UserError: torch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: expected one that torch can use here, got {name!r} ({first_line(error)}); try cpu"
        ) from None


def set_threads(num: int) -> None:
    """Let torch use so many CPU threads; 0: as many as it finds.

    Raises:
        UserError: a negative number.
    """
    if num < 0:
        raise UserError(f"--threads: expected 0 or more, got {num}")
    torch.set_num_threads(num or torch.get_num_threads())


def is_wsl(release: Path = Path("/proc/sys/kernel/osrelease")) -> bool:
    """Return whether the kernel is that of the Windows Subsystem for Linux."""
    return release.is_file() and "microsoft" in release.read_text().lower()


def grow_segments() -> None:
    """Let torch's allocator on GPUs grow and shrink its segments, unless the environment configures it.

    In segments of fixed size, CUDA graphs cannot use the memory of the steps before their recording, nor can it be
    returned: a step of the workstation preset held 6.8 GB where 5.7 were in use. Under WSL they stay fixed: with some
    of its drivers the first allocation fails otherwise (pytorch issue 192330).
    """
    if not is_wsl() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        change = (
            getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
        )
        change("expandable_segments:True")


def on_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Return a tensor or array of the host on `device`, without waiting for a GPU."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """Copies of tensors to the host that a GPU may still be writing; `read()` waits for them only then.

    On the CPU they are the tensors themselves, so that nobody may write to those afterwards.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].device.type == "cuda":
            copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._event, tensors = torch.cuda.Event(), copies
            self._event.record()
        self._tensors = tensors

    def read(self) -> tuple[Tensor, ...]:
        """Return the copies, complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class KeepAlive:
    """Hold a reference to host memory; `wait()` returns when a GPU has done all that was queued until now."""

    def __init__(self, owner: object) -> None:
        self._owner, self._event = owner, torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        """Wait for the GPU; afterwards the memory may be dropped."""
        self._event.synchronize()


def device_bytes(device: torch.device) -> int:
    """Return the memory of a CUDA device, or of the machine, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    of_cpu = ("can't allocate memory", "not enough memory")
    of_dali = ("out of memory", "bad_alloc", "cudaerrormemoryallocation", "cuda allocation failed")
    return any(text in str(error).lower() for text in (*of_cpu, *of_dali))
