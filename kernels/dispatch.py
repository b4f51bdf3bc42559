"""The table of backends, and the choice that `backend="auto"` makes from it.

A backend that is asked for by name and cannot run raises; only "auto" falls back, and logs a failed self check once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels import driver
from rlv2v.kernels.cpu import CpuRecurrence
from rlv2v.kernels.cuda import CudaRecurrence
from rlv2v.kernels.driver import Operands, Problem, Recurrence
from rlv2v.kernels.eager import EagerRecurrence
from rlv2v.kernels.layout import dense, state_dtype
from rlv2v.kernels.reference import LIMITS
from rlv2v.kernels.triton.recurrence import TritonRecurrence


class Backend(NamedTuple):
    """A line of the table: an implementation, the problems that "auto" gives to it, and why."""

    recurrence: Recurrence
    auto: Callable[[Problem], bool]
    why: str


def cpu_is_fast(problem: Problem) -> bool:
    """Return whether the CPU backend beats eager: not with portable gates in 16 bits, converted one by one."""
    return problem.device.type == "cpu" and (problem.dtype.itemsize == 4 or _native.isa() != "portable")


# "auto" takes the first line that wants the problem and can run it; bench/convlstm.py measures what the lines claim.
TABLE = {
    "cpu": Backend(CpuRecurrence(), cpu_is_fast, "faster than eager and compiled at every shape of bench/convlstm.py"),
    "triton": Backend(
        TritonRecurrence(),
        lambda problem: problem.device.type == "cuda",
        "one launch a step where eager needs ten; not yet timed on a GPU",
    ),
    "cuda": Backend(CudaRecurrence(), lambda _: False, "one launch a sequence; not yet timed on a GPU"),
    "eager": Backend(EagerRecurrence(), lambda _: True, "it runs everywhere"),
}
BACKENDS = ("reference", *TABLE)


@dataclass(frozen=True)
class Selection:
    """The backend that `backend="auto"` runs, why, and for each other backend why not."""

    backend: str
    why: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}", *(f"not {name}: {reason}" for name, reason in self.others.items())]
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def select(problem: Problem) -> Selection:
    """Return the table's answer for a problem."""
    others = {"reference": "it is the definition, kept plain"}
    selected: str | None = None
    for name, backend in TABLE.items():
        reason = backend.recurrence.unsupported_reason(problem)
        if reason is None and selected is None and backend.auto(problem):
            reason = self_check_failure(name, problem.device, problem.dtype, problem.channels, problem.kernel)
            if reason is None:
                selected = name
                continue
        others[name] = reason or ""
    assert selected is not None
    others = {name: reason or f"{selected} is preferred" for name, reason in others.items()}
    return Selection(selected, TABLE[selected].why, others)


def check_backend(backend: object) -> None:
    """Raise ValueError for a name that is neither "auto" nor in `BACKENDS`."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"convlstm: backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")


def recurrence(backend: str, problem: Problem) -> Recurrence:
    """Return the implementation behind a name; ValueError if it is unknown or cannot run the problem."""
    if backend == "auto":
        return TABLE[select(problem).backend].recurrence
    check_backend(backend)
    reason = TABLE[backend].recurrence.unsupported_reason(problem)
    if reason is not None:
        raise ValueError(f"convlstm: backend {backend!r} cannot run this: {reason}")
    return TABLE[backend].recurrence


@cache
def self_check_failure(
    backend: str, device: torch.device, dtype: torch.dtype, channels: int, kernel: int
) -> str | None:
    """Return why "auto" must not use a GPU backend for C and k on a device, or None if a small layer comes out right.

    Compiled kernels meet drivers and cards that no test has seen, and silently wrong numbers would cost a training.
    Runs once a process for each C and k; it compiles what the layer itself would.
    """
    if device.type == "cpu" or backend == "eager":
        return None
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            value, gradient = self_check_errors(TABLE[backend].recurrence, device, dtype, channels, kernel)
    except Exception as failure:
        reason = f"its check on {device} failed: {failure}"
    else:
        limits = LIMITS[dtype]
        if value <= limits.value and gradient <= limits.gradient:
            return None
        reason = f"its check on {device} in {dtype} is off by {value:.1e}, gradients by {gradient:.1e}; limits {limits}"
    logging.getLogger("rlv2v.kernels").warning("convlstm: backend %r is not used: %s", backend, reason)
    return reason


def self_check_errors(
    run: Recurrence, device: torch.device, dtype: torch.dtype, channels: int, kernel: int
) -> tuple[float, float]:
    """Compare a small layer with eager float64; return the largest error of h and the largest relative gradient error.

    Covers kept and recomputed gates, and gradients that arrive at h and c of every step.
    """
    rng = torch.Generator().manual_seed(0)
    taps = kernel * kernel

    def normal(*shape: int, like: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=rng) * scale).to(like)

    def frames(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return dense(normal(*shape, like=like))

    tensors = (
        frames(1, 3, 2, 4, 7, 9),
        normal(1, 4 * channels, 4, kernel, kernel, scale=(4 * taps) ** -0.5),
        normal(1, 4 * channels, channels, kernel, kernel, scale=(channels * taps) ** -0.5),
        normal(1, 4 * channels),
        frames(1, 2, channels, 7, 9),
        frames(1, 2, channels, 7, 9, like=state_dtype(dtype)),
    )
    dhs, dcs = (frames(1, 3, 2, channels, 7, 9, like=like) for like in (dtype, state_dtype(dtype)))

    def results(run: Recurrence, convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        operands = Operands(*(convert(tensor) for tensor in tensors))
        outputs = run.forward(operands, keep_gates=True)
        computed: list[Tensor | None] = [outputs.hs]
        for saved in (outputs, outputs._replace(gates=None)):
            computed += driver.backward(run, operands, saved, convert(dhs), convert(dcs), need=[True] * 6)
        return [tensor.double().cpu() for tensor in computed if tensor is not None]

    h, *exact = results(EagerRecurrence(), torch.Tensor.double)
    h_ours, *ours = results(run, lambda tensor: tensor.to(device))
    # torch's max, not Python's, which passes over a NaN.
    gradients = torch.stack([(b - e).norm() / e.norm() for b, e in zip(ours, exact, strict=True)])
    return (h - h_ours).abs().max().item(), gradients.max().item()
