"""Which device torch shall use, and the ways to and from it that do not stop the host."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from rlv2v.errors import UserError


def pick_device(name: str) -> torch.device:
    """The named torch device ("cpu", "cuda", "cuda:1"), tried out; "auto" is cuda where there is one.

    Raises:
        UserError: torch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: expected one that torch can use here, got {name!r} ({reason}); try cpu") from None


def grow_segments() -> None:
    """Let torch's allocator on GPUs grow and shrink its segments, where the environment says nothing else.

    Cut from segments of fixed size, the memory of plain steps was of no use to their recordings and could not be given
    back: a step of the workstation preset held 6.8 GB where 5.7 were in use.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        change = (
            getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
        )
        change("expandable_segments:True")


def on_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """A tensor or array of the host on `device`; a GPU is not waited for."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """Copies of tensors on the host that may still be under way; `read()` gives them, waiting only if they are.

    On the CPU they are the tensors themselves: for tensors that nobody writes to again.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].device.type == "cuda":
            copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            tensors = tuple(copies)
        self._tensors = tensors

    def read(self) -> tuple[Tensor, ...]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class Held:
    """Keeps memory of the host alive until a GPU has done what it was asked for before now."""

    def __init__(self, kept: object) -> None:
        self._kept, self._event = kept, torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()
