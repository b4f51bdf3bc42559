"""Which backend runs a ConvLSTM: what each can run, and the table by which `backend="auto"` chooses.

A requested backend that cannot run raises; only "auto" falls back, and says so once.
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
from rlv2v.kernels import cuda, driver
from rlv2v.kernels.cpu import CpuRecurrence
from rlv2v.kernels.driver import Recurrence
from rlv2v.kernels.eager import EagerRecurrence
from rlv2v.kernels.layout import dense, state_dtype
from rlv2v.kernels.reference import LIMITS
from rlv2v.kernels.triton.recurrence import TritonRecurrence
from rlv2v.kernels.triton.recurrence import available as triton_available

BACKENDS = ("reference", "eager", "cpu", "triton", "cuda")


class Problem(NamedTuple):
    """What a choice may depend on: device, x's dtype, and the numbers G,T,B,C,H,W,k."""

    device: torch.device
    dtype: torch.dtype
    groups: int
    steps: int
    batch: int
    channels: int
    height: int
    width: int
    kernel: int

    @classmethod
    def of(cls, x: Tensor, w_h: Tensor) -> Problem:
        """From x (G,T,B,C_in,H,W) and w_h (G,4C,C,k,k)."""
        groups, steps, batch, _, height, width = x.shape
        return cls(x.device, x.dtype, groups, steps, batch, w_h.shape[2], height, width, w_h.shape[-1])


class Backend(NamedTuple):
    """An implementation of the recurrence, and what stands in its way: None when it can run the problem."""

    recurrence: Recurrence
    obstacle: Callable[[Problem], str | None]


class Rule(NamedTuple):
    """A line of the table: where `applies` holds, `backend` is chosen, because of `why`."""

    backend: str
    applies: Callable[[Problem], bool]
    why: str


def cpu_obstacle(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it runs on the CPU, x is on {problem.device}"
    return None if problem.dtype.itemsize < 8 else f"it computes in float32 at most, x is {problem.dtype}"


def cpu_is_fast(dtype: torch.dtype) -> bool:
    """Not with 16 bits where the gates are portable: they are converted one by one, and PyTorch's are faster."""
    return dtype.itemsize == 4 or _native.gates_isa() != "portable"


def triton_obstacle(problem: Problem) -> str | None:
    if problem.dtype.itemsize == 8:
        return f"it computes in float32 at most, x is {problem.dtype}"
    return triton_available(problem.device)


def cuda_obstacle(problem: Problem) -> str | None:
    missing = cuda.available(problem.device)
    if missing is not None:
        return missing
    properties = torch.cuda.get_device_properties(problem.device)
    return cuda.fits(problem.channels, problem.kernel, problem.dtype, properties, problem.groups)


RUNNERS = {
    "eager": Backend(EagerRecurrence(), lambda _: None),
    "cpu": Backend(CpuRecurrence(), cpu_obstacle),
    "triton": Backend(TritonRecurrence(), triton_obstacle),
    "cuda": Backend(cuda.CudaRecurrence(), cuda_obstacle),
}

# The first line that applies and whose backend can run the problem is chosen; bench/convlstm.py measures what it says.
TABLE = (
    Rule("eager", lambda p: p.dtype.itemsize == 8, "float64 is for checking"),
    Rule(
        "cpu",
        lambda p: p.device.type == "cpu" and cpu_is_fast(p.dtype),
        "faster than eager and compiled at every shape of bench/convlstm.py",
    ),
    Rule(
        "triton", lambda p: p.device.type == "cuda", "one launch a step where eager needs ten; not yet timed on a GPU"
    ),
    Rule("eager", lambda _: True, "it runs everywhere"),
)


@dataclass(frozen=True)
class Choice:
    """What `backend="auto"` runs and why; `others`: why each other backend is not it."""

    backend: str
    why: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}", *(f"not {name}: {reason}" for name, reason in self.others.items())]
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Choice:
    """The table's answer for a problem."""
    others = {"reference": "it is the definition, kept plain"}
    chosen: Rule | None = None
    for rule in TABLE:
        if chosen is not None or not rule.applies(problem):
            continue
        reason = RUNNERS[rule.backend].obstacle(problem) or distrust(
            rule.backend, problem.device, problem.dtype, problem.channels, problem.kernel
        )
        if reason is None:
            chosen = rule
        else:
            others[rule.backend] = reason
    assert chosen is not None
    for name, (_, obstacle) in RUNNERS.items():
        if name != chosen.backend and name not in others:
            others[name] = obstacle(problem) or f"{chosen.backend} comes first in the table"
    return Choice(chosen.backend, chosen.why, others)


def check_backend(backend: object) -> None:
    """Raise ValueError for a name that is not in `BACKENDS`, nor "auto"."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"convlstm: backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")


def recurrence(backend: str, problem: Problem) -> Recurrence:
    """The implementation behind a name; ValueError where it is unknown or cannot run the problem."""
    if backend == "auto":
        return RUNNERS[choose(problem).backend].recurrence
    check_backend(backend)
    reason = RUNNERS[backend].obstacle(problem)
    if reason is not None:
        raise ValueError(f"convlstm: backend {backend!r} cannot run this: {reason}")
    return RUNNERS[backend].recurrence


@cache
def distrust(backend: str, device: torch.device, dtype: torch.dtype, channels: int, kernel: int) -> str | None:
    """Why "auto" must not use a GPU backend for C and k on a device: None when a small layer of them comes out right.

    Compiled kernels meet drivers and cards that no test has seen; wrong numbers in silence would cost a training. Asked
    once a process; it compiles what the layer itself would.
    """
    if device.type == "cpu" or backend == "eager":
        return None
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            value, gradient = errors(RUNNERS[backend].recurrence, device, dtype, channels, kernel)
    except Exception as failure:
        reason = f"its check on {device} failed: {failure}"
    else:
        limits = LIMITS[dtype]
        if value <= limits.value and gradient <= limits.gradient:
            return None
        reason = f"its check on {device} in {dtype} is off by {value:.1e}, gradients by {gradient:.1e}; limits {limits}"
    logging.getLogger("rlv2v.kernels").warning("convlstm: backend %r is not used: %s", backend, reason)
    return reason


def errors(
    run: Recurrence, device: torch.device, dtype: torch.dtype, channels: int, kernel: int
) -> tuple[float, float]:
    """Of a small layer beside float64 in plain PyTorch: the largest of h, the largest relative one of a gradient.

    With gates that are kept and with gates that are recomputed, and gradients to h and c of every step.
    """
    rng = torch.Generator().manual_seed(0)
    taps = kernel * kernel

    def normal(*shape: int, like: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=rng) * scale).to(like)

    def frames(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return dense(normal(*shape, like=like))

    given = (
        frames(1, 3, 2, 4, 7, 9),
        normal(1, 4 * channels, 4, kernel, kernel, scale=(4 * taps) ** -0.5),
        normal(1, 4 * channels, channels, kernel, kernel, scale=(channels * taps) ** -0.5),
        normal(1, 4 * channels),
        frames(1, 2, channels, 7, 9),
        frames(1, 2, channels, 7, 9, like=state_dtype(dtype)),
    )
    dhs, dcs = (frames(1, 3, 2, channels, 7, 9, like=like) for like in (dtype, state_dtype(dtype)))

    def outcome(run: Recurrence, place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x, w_x, w_h, bias, h0, c0 = (place(tensor) for tensor in given)
        hs, cs, kept = driver.forward(run, x, w_x, w_h, bias, h0, c0, keep_gates=True)
        found: list[Tensor | None] = [hs]
        for gates in (kept, None):
            found += driver.backward(
                run, place(dhs), place(dcs), x, w_x, w_h, bias, h0, c0, hs, cs, gates, need=[True] * 6
            )
        return [tensor.double().cpu() for tensor in found if tensor is not None]

    (h, *exact), (h_ours, *ours) = outcome(EagerRecurrence(), torch.Tensor.double), outcome(run, lambda b: b.to(device))
    # torch's max, not Python's, which passes over a NaN.
    gradients = torch.stack([(b - e).norm() / e.norm() for b, e in zip(ours, exact, strict=True)])
    return (h - h_ours).abs().max().item(), gradients.max().item()
