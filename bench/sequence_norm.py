"""Time the end of a block as one operator beside the same in PyTorch's operators, as it was before.

    python bench/sequence_norm.py [--rounds 15] [--device cuda] [--json F]

A case is x and residual (B,T,C,H,W), LeakyReLU, windows of 2x2 pixels or none, and the normalisation. `forward` is
without gradients, `forward+backward` makes those of x, residual, weight and bias. Bytes are those that must move:
forward reads x and residual and writes a, p and y; backward reads a, p and dy and writes dx. The limit is a copy of as
many bytes into memory that exists. Both sides take their results' memory as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from harness import CLOCKS, Bench, Contender, DeviceArgs, Row, compare, copy_limit
from torch import Tensor

from rlv2v import _native
from rlv2v.cli import run_command
from rlv2v.kernels.layout import dense_video
from rlv2v.kernels.sequence_norm import sequence_norm

SLOPE = 0.2
Shape = tuple[int, int, int, int, int]
# Of the default preset's generator, of workstation's, and of a layer that no cache holds.
CASES: list[tuple[Shape, tuple[int, int]]] = [
    ((5, 8, 8, 16, 16), (2, 2)),
    ((5, 8, 16, 8, 8), (2, 2)),
    ((5, 8, 24, 4, 4), (2, 2)),
    ((5, 8, 8, 16, 16), (1, 1)),
    ((2, 16, 32, 64, 64), (2, 2)),
    ((2, 16, 32, 64, 64), (1, 1)),
    ((8, 16, 32, 64, 64), (2, 2)),
]
LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}  # of y against float64; a, p and y are rounded


@dataclass(frozen=True)
class Args(DeviceArgs):
    """Compare ways to end a block; --quick: the first and a middle shape."""


def name_of(shape: Shape, pool: tuple[int, int]) -> str:
    """Return a case's name."""
    return " ".join(f"{name}{size}" for name, size in zip("BTCHW", shape, strict=True)) + f" /{pool[0]}"


def bytes_of(shape: Shape, pool: tuple[int, int], element: int) -> tuple[float, float]:
    """Return the bytes that forward and backward must move."""
    whole = float(element * prod(shape))
    pooled = whole / prod(pool)
    if prod(pool) == 1:
        return 4 * whole, 3 * whole  # p is a
    return 3 * whole + 2 * pooled, 2 * whole + 2 * pooled


def arguments(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return tensors that want gradients."""
    rng = torch.Generator().manual_seed(0)
    frames = (dense_video(torch.randn(shape, generator=rng).to(device, dtype)) for _ in range(2))
    parameters = torch.ones(shape[2], device=device), torch.zeros(shape[2], device=device)
    made = zip(("x", "residual", "weight", "bias"), (*frames, *parameters), strict=True)
    return {name: tensor.requires_grad_() for name, tensor in made}


def case_rows(shape: Shape, pool: tuple[int, int], dtype: torch.dtype, args: Args) -> list[Row]:
    """Return the rows of one shape, forward, and forward and backward."""
    inputs = arguments(shape, dtype, args.device)
    name = str(dtype).removeprefix("torch.")
    ours = "triton" if args.device == "cuda" else "cpu"

    def run(backend: str) -> Tensor:
        return sequence_norm(**inputs, slope=SLOPE, pool=pool, backend=backend)[0]

    def forward(backend: str) -> Tensor:
        with torch.no_grad():
            return run(backend)

    def both(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(backend), [*inputs.values()], dy)

    dy = torch.randn_like(forward("reference"))
    exact = {key: value.detach().double() for key, value in inputs.items()}
    right = sequence_norm(**exact, slope=SLOPE, pool=pool, backend="reference")[0]
    num_bytes, rows = bytes_of(shape, pool, dtype.itemsize), list[Row]()
    calls: dict[str, tuple[Callable[[str], object], float]] = {
        "forward": (forward, num_bytes[0]),
        "forward+backward": (both, sum(num_bytes)),
    }
    sets = [_native.isa()] if args.quick or args.device == "cuda" else [*_native.isas()]
    for passes, (call, moved) in calls.items():
        contenders, usual = list[Contender](), _native.isa()
        for isa in sets:
            choose = partial(_native.set_isa, isa)
            choose()
            valid = bool((forward(ours).double() - right).abs().max() < LIMITS[name] * right.abs().max())
            label = ours if ours == "triton" else isa
            contenders.append(
                Contender(label, partial(call, ours), name, {"gb_s": moved}, ours=True, valid=valid, setup=choose)
            )
        contenders.append(Contender("torch", partial(call, "reference"), name, {"gb_s": moved}))
        contenders.append(copy_limit(moved, name, args.device))
        rows += compare(name_of(shape, pool), passes, contenders, args.num_rounds, CLOCKS[args.device])
        _native.set_isa(usual)
    return rows


def main(args: Args) -> None:
    """Time all cases."""
    with Bench("sequence_norm", args) as bench:
        for shape, pool in [CASES[0], CASES[4]] if args.quick else CASES:
            for dtype in (torch.float32, torch.bfloat16):
                bench.add(case_rows(shape, pool, dtype, args))


if __name__ == "__main__":
    run_command(main, Args)
