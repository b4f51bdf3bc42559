"""Time the bilateral grid's kernels beside PyTorch's ways to the same result.

    python bench/bilateral.py [--rounds 15] [--device cuda] [--json F]

`frame`: one frame of bytes to another. `translate`: the same by a generator of the default preset, which looks at the
frame made small and decides the grid; untrained, which takes as long. `forward` and `backward`: frames of floats, as in
training. Peers: 5-D `grid_sample` and a product (the reference); and upsampling every bin's coefficients to full size,
weighed by hat functions of the guide. The limit is a copy of as many bytes as the arguments and the result have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from harness import CLOCKS, Bench, Contender, DeviceArgs, Row, compare, copy_limit
from torch import Tensor
from torch.nn.functional import interpolate

from rlv2v import _native
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.kernels.bilateral import slice_apply, slice_apply_frame, slice_apply_ref
from rlv2v.method.translation import Stream
from rlv2v.model.build import build_nets
from rlv2v.model.grid import AROUND

Transform = Callable[[Tensor, Tensor, Tensor], Tensor]

BINS, CELLS, CURVES = 6, (5, 8), 9
SHORT_SIDE = 64  # of the frames that the generator looks at
FRAMES = {"720p": (720, 1280), "1080p": (1080, 1920), "4K": (2160, 3840)}
LIMIT = 2e-5  # sums of 32 products of numbers of unit size, and places in float32


@dataclass(frozen=True)
class Args(DeviceArgs):
    """Compare ways to slice and apply a bilateral grid; --quick: 720p and small training frames."""


def upsample_and_hats(grid: Tensor, guide: Tensor, frames: Tensor) -> Tensor:
    """Upsample the coefficients of each bin bilinearly, and add up those that the guide's hat functions leave."""
    bins, size = grid.shape[2], frames.shape[2:]
    place = (guide * bins - 0.5).clamp(0, bins - 1)
    a = frames.new_zeros(len(frames), 12, *size)
    for n in range(bins):
        weight = (1 - (place - n).abs()).clamp(min=0)
        a = a + interpolate(grid[:, :, n], size, mode="bilinear", align_corners=False) * weight[:, None]
    a = a.unflatten(1, (3, 4))
    return (a[:, :, :3] * frames[:, None]).sum(2) + a[:, :, 3]


PEERS: dict[str, Transform] = {
    "grid_sample": slice_apply_ref,
    "upsample and hats": upsample_and_hats,
}


def arguments(batch: int, cells: tuple[int, int], size: tuple[int, int], device: str) -> list[Tensor]:
    """Return grid, guide and frames that want gradients; the grid is near the identity."""
    rng = torch.Generator().manual_seed(0)
    grid = torch.eye(3, 4).reshape(12, 1, 1, 1) + 0.2 * torch.randn(batch, 12, BINS, *cells, generator=rng)
    guide = torch.rand(batch, *size, generator=rng)
    frames = torch.rand(batch, 3, *size, generator=rng) * 2 - 1
    return [tensor.to(device).requires_grad_() for tensor in (grid, guide, frames)]


def frame_rows(case: str, size: tuple[int, int], rounds: int) -> list[Row]:
    """Return the rows of one frame of bytes, on the CPU; every instruction set that it has is a row."""
    rng = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*size, 3), generator=rng, dtype=torch.uint8)
    grid = arguments(1, CELLS, (1, 1), "cpu")[0].detach()
    around = torch.rand(len(AROUND), CELLS[0] * 4, CELLS[1] * 4, generator=rng) * 2 - 1
    curve = torch.randn(CURVES, 5 + len(AROUND), generator=rng) * 0.1
    curve[0] = torch.tensor([0.15, 0.29, 0.06, *([0.0] * len(AROUND)), 0.5, 0.0])

    def by(transform: Transform) -> Tensor:
        x = to_model(frame)
        pixels = torch.cat((x, interpolate(around[None], size, mode="bilinear", align_corners=False)[0]))
        values = torch.einsum("jk,khw->jhw", curve[:, :-2], pixels) + curve[:, -2, None, None]
        guide = values[0] + (curve[1:, -1, None, None] * values[1:].relu()).sum(0)
        return to_uint8(transform(grid, guide[None], x[None])[0])

    right = by(slice_apply_ref).int()

    def ours(isa: str) -> Tensor:
        _native.set_isa(isa)
        return slice_apply_frame(frame, grid[0], curve, around)

    usual, contenders = _native.isa(), list[Contender]()
    work = {"gb_s": 2.0 * frame.numel()}
    for isa in _native.isas():
        off = (ours(isa).int() - right).abs()
        good = bool(off.max() <= 1 and (off > 0).float().mean() < 0.01)
        contenders.append(Contender(f"rlv2v, {isa}", partial(ours, isa), "uint8", work, ours=True, valid=good))
    contenders += [Contender(name, partial(by, transform), "uint8") for name, transform in PEERS.items()]
    rows = compare(case, "frame", [*contenders, copy_limit(2.0 * frame.numel(), "uint8")], rounds)
    _native.set_isa(usual)
    return rows


def translate_rows(case: str, size: tuple[int, int], rounds: int) -> list[Row]:
    """Return the row of one frame of bytes through generator and grid, on the CPU, without any codec."""
    rng = torch.Generator().manual_seed(1)
    frame = torch.randint(0, 256, (*size, 3), generator=rng, dtype=torch.uint8).numpy()
    config = Config.of("default", size=SHORT_SIDE)
    stream = Stream(build_nets(config, discriminators=False).g_y.eval(), config)
    for _ in range(config.data.frames):  # then its state no longer grows
        stream(frame)
    contenders = [Contender("rlv2v", partial(stream, frame), "uint8", ours=True)]
    return compare(case, "translate", contenders, rounds)


def tensor_rows(case: str, inputs: list[Tensor], backend: str, rounds: int, device: str) -> list[Row]:
    """Return the rows of frames of floats, forward and backward."""
    with torch.no_grad():
        right = slice_apply_ref(*(tensor.double() for tensor in inputs))
    d_out, rows = torch.randn_like(inputs[2]), list[Row]()
    ways: dict[str, Transform] = {"rlv2v": partial(slice_apply, backend=backend), **PEERS}
    num_bytes = 4.0 * sum(tensor.numel() for tensor in (*inputs, inputs[2]))

    def forward(way: Transform) -> Tensor:
        with torch.no_grad():
            return way(*inputs)

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    outs = {name: way(*inputs) for name, way in ways.items()}
    good = {name: bool((out.double() - right).abs().max() < LIMIT * BINS) for name, out in outs.items()}
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(forward, way) for name, way in ways.items()},
        "backward": {name: partial(backward, out) for name, out in outs.items()},
    }
    for passes, own in calls.items():
        work = {"gb_s": num_bytes * (1 if passes == "forward" else 2)}
        contenders = [
            Contender(name, call, work=work, ours=name == "rlv2v", valid=good[name]) for name, call in own.items()
        ]
        rows += compare(case, passes, [*contenders, copy_limit(num_bytes, device=device)], rounds, CLOCKS[device])
    return rows


def main(args: Args) -> None:
    """Time all cases."""
    with Bench("bilateral", args) as bench:
        if args.device == "cpu":
            for case, size in [*FRAMES.items()][: 1 if args.quick else None]:
                bench.add(frame_rows(case, size, args.num_rounds))
                bench.add(translate_rows(case, size, args.num_rounds))
        backend = "triton" if args.device == "cuda" else "cpu"
        cases = {"64 frames of 64x64": arguments(64, (4, 4), (64, 64), args.device)}
        if not args.quick:
            cases["1080p"] = arguments(1, CELLS, FRAMES["1080p"], args.device)
        for case, inputs in cases.items():
            bench.add(tensor_rows(case, inputs, backend, args.num_rounds, args.device))


if __name__ == "__main__":
    run_command(main, Args)
