"""Time the ConvLSTM beside what users have: a layer, its gates alone, the bytes it keeps, the kernels it launches.

    python bench/convlstm.py [--device cpu|cuda] [--json F] [--quick]

Contenders of a case run in turns, compiled and warmed up before. Each is first checked against the reference in
float64, on inputs that all dtypes hold exactly: ours to the kernels' limits, peers to twice those. Ratios are like for
like, bfloat16 over bfloat16. % of limit: the time of the work at the best rate that a bare convolution or GEMM (FLOPs)
and a copy (bytes) reached in between, the longer of the two. convlstm_peers says who the peers are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from convlstm_counts import launch_rows, saved_rows
from convlstm_gates import gates_contenders
from convlstm_layer import (
    PASSES,
    Form,
    Layer,
    Shape,
    checked,
    layer_rows,
    limits_of,
    name_of,
    runnable,
    solved,
    stacked,
)
from convlstm_peers import cpu_forms, cuda_forms, eager, mine
from harness import CLOCKS, Bench, Contender, DeviceArgs, Row, compare

from rlv2v.cli import run_command
from rlv2v.errors import UserError

CPU_SHAPES = [Shape(4, 8, 32, 32, 32, 32), Shape(2, 8, 16, 16, 64, 64), Shape(4, 8, 128, 128, 8, 8)]
GPU_SIDES = {32: 32, 64: 16, 128: 8, 256: 8}
"""Side of the frames by channels."""
GPU_SHAPES = [Shape(batch, 8, c, c, side, side) for c, side in GPU_SIDES.items() for batch in (1, 2, 4, 16)]
SAVED_SHAPE = Shape(2, 8, 16, 16, 16, 16)
NETWORKS = 4


@dataclass(frozen=True)
class Args(DeviceArgs):
    """Time the ConvLSTM against its peers."""

    only: tuple[str, ...] = ()
    """Cases whose name contains one of these words, like `gates` or `B4`; all when empty."""


def grouped_rows(
    bench: Bench, shape: Shape, dtype: torch.dtype, backend: str, rounds: int, device: str = "cuda"
) -> list[Row]:
    """Time four networks of a shape: in one grouped call, in four calls of ours, in four of eager."""
    case, rows = f"{NETWORKS} networks {shape}", list[Row]()
    for form in runnable(bench, case, [mine(backend, dtype, "frame-major")], shape, device, NETWORKS):
        data = [solved(shape, device, seed) for seed in range(NETWORKS)]
        ways = {
            "eager": [Layer(Form("eager", dtype, eager, joined=True), one, device) for one in data],
            f"{backend} {NETWORKS} calls": [Layer(form, one, device) for one in data],
            f"{backend} grouped": [Layer(form, stacked(data), device)],
        }
        differences = {way: [layer.check() for layer in layers] for way, layers in ways.items()}
        whole = shape._replace(batch=NETWORKS * shape.batch)
        for passes in PASSES:
            contenders = []
            for way, layers in ways.items():
                calls = [layer.call(passes) for layer in layers]
                in_turn = lambda calls=calls: [call() for call in calls]  # noqa: E731
                contender = Contender(way, in_turn, name_of(dtype), whole.work(passes, dtype), ours=way != "eager")
                every = [checked(contender, difference, dtype) for difference in differences[way]]
                contenders.append(min(every, key=lambda one: one.valid))
            contenders += limits_of(whole, passes, [dtype], device)
            rows += compare(case, passes, contenders, rounds, CLOCKS[device])
    return rows


def main(args: Args) -> None:
    """Check, time, print the table and the JSON line; exit code 1 if one of ours is wrong."""

    def wanted(name: str) -> bool:
        return not args.only or any(word in name for word in args.only)

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # everybody gets cuDNN's fastest convolution
    with Bench("convlstm", args) as bench:
        rounds, quick = args.num_rounds, args.quick
        if args.device == "cpu":
            for shape in CPU_SHAPES[:1] if quick else CPU_SHAPES:
                if wanted(f"layer {shape}"):
                    bench.add(layer_rows(bench, shape, cpu_forms(quick=quick), rounds, PASSES[1:] if quick else PASSES))
                gates = f"gates B{shape.batch} C{shape.channels} {shape.height}x{shape.width}"
                if wanted(gates):
                    bench.add(compare(gates, PASSES[1], gates_contenders(shape, with_compiled=True), rounds))
        for shape in (GPU_SHAPES[2:3] if quick else GPU_SHAPES) if args.device == "cuda" else ():
            for dtype in (torch.float16, torch.bfloat16):
                if wanted(f"layer {shape}"):
                    bench.add(layer_rows(bench, shape, cuda_forms(dtype, quick=quick), rounds, device="cuda"))
                for backend in ("triton", "cuda"):
                    if wanted(f"{NETWORKS} networks {shape}"):
                        bench.add(grouped_rows(bench, shape, dtype, backend, rounds))
        if wanted("saved"):
            bench.add(saved_rows(bench, SAVED_SHAPE, args.device))
        if args.device == "cuda" and wanted("launches"):
            bench.add(launch_rows(bench))
        if not bench.rows and not bench.missing:
            raise UserError(f"--only {' '.join(args.only)}: no case is called so")


if __name__ == "__main__":
    run_command(main, Args)
