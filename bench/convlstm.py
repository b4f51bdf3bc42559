"""The ConvLSTM against what users have: a whole layer, its gates alone, the bytes it keeps, the kernels it launches.

    python bench/convlstm.py [--device cpu|cuda] [--json F] [--quick]

All contenders of a case run in one process in turn, each round in another order, without garbage collection, compiled
and warmed up before; medians with p20 and p80. Each is first held to the reference in float64, on inputs that all
dtypes hold exactly: ours to the kernels' limits, peers to twice those. One that fails is refused: no times and
`"valid": false`, and exit code 1 if it is ours. `x eager` is over eager in float32 on the CPU, in the row's dtype on a
GPU. % of limit: what the work would take at the best rate that a bare convolution or GEMM (FLOPs) and a copy (bytes)
reached in between, the longer of the two. convlstm_peers says who the peers are; convlstm_gates, _counts and _launches,
what else is measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from convlstm_counts import saved_rows
from convlstm_cuda import DTYPES, SHAPES, grouped_rows
from convlstm_gates import gates_rows, name_of_step
from convlstm_launches import launch_rows
from convlstm_layer import Shape, layer_rows
from convlstm_peers import cpu_forms, cuda_forms
from convlstm_rows import HEADER, Row
from machine import commit, machine

from rlv2v.cli import run_command
from rlv2v.errors import UserError

CPU_SHAPES = [Shape(4, 8, 32, 32, 32, 32), Shape(2, 8, 16, 16, 64, 64), Shape(4, 8, 128, 128, 8, 8)]
SAVED = Shape(2, 8, 16, 16, 16, 16)
QUICK_ROUNDS = 5


@dataclass(frozen=True)
class Args:
    """Time the ConvLSTM against its peers."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the layers run; the gates alone are timed on the CPU only."""
    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    quick: bool = False
    """Within a minute: one shape, few rounds, no compiled layers (compiled gates are there)."""
    only: tuple[str, ...] = ()
    """Cases whose name has one of these words in it, like `gates` or `B4`; all when empty."""
    rounds: int = 15
    """Turns of each contender."""
    threads: int = 1
    """CPU threads."""


class Target(NamedTuple):
    """What is aimed at: of our rows on the CPU, in a case's kind, dtype and training, the ratio over a peer."""

    kind: str
    dtype: str
    peer: str
    ratio: float


TARGETS = (
    Target("layer", "float32", "eager", 1.15),
    Target("layer", "float32", "best compiled", 1.08),
    Target("layer", "bfloat16", "eager", 2.1),
    Target("layer", "bfloat16", "best autocast+compile", 1.15),
    Target("gates", "float32", "eager", 4.0),
    Target("gates", "float32", "best compiled float32", 3.0),
    Target("gates", "bfloat16", "eager bfloat16", 4.0),
    Target("gates", "bfloat16", "best compiled bfloat16", 3.0),
)

# Not `recompute`, which buys memory with time.
OURS_AS_FED = ("cpu", "cpu frame-major", "cpu autocast")


def wanted(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(word in name for word in only)


def cpu_rows(args: Args, rounds: int) -> tuple[list[Row], dict[str, str]]:
    """Layers and gates on the CPU."""
    rows, missing = list[Row](), dict[str, str]()
    for shape in CPU_SHAPES[:1] if args.quick else CPU_SHAPES:
        if wanted(f"layer {shape}", args.only):
            passes = ("forward+backward",) if args.quick else ("forward", "forward+backward")
            more, why = layer_rows(shape, cpu_forms(quick=args.quick), rounds, passes)
            rows += more
            missing |= why
        if wanted(name_of_step(shape), args.only):
            rows += gates_rows(shape, rounds)
    return rows, missing


def cuda_rows(args: Args, rounds: int) -> tuple[list[Row], dict[str, str]]:
    """Layers on the GPU, alone and four at a time."""
    rows, missing = list[Row](), dict[str, str]()
    torch.backends.cudnn.benchmark = True  # everybody gets cuDNN's fastest convolution
    for shape in SHAPES[2:3] if args.quick else SHAPES:
        for dtype in DTYPES:
            if wanted(f"layer {shape}", args.only):
                more, why = layer_rows(shape, cuda_forms(dtype, quick=args.quick), rounds, device="cuda")
                rows += more
                missing |= why
            for backend in ("triton", "cuda"):
                if wanted(f"networks {shape}", args.only):
                    more, why = grouped_rows(shape, dtype, backend, rounds)
                    rows += more
                    missing |= why
    return rows, missing


def count_rows(args: Args) -> tuple[list[Row], dict[str, str]]:
    """What takes no time to measure: bytes kept, kernels launched."""
    rows, missing = list[Row](), dict[str, str]()
    if wanted("saved", args.only):
        rows, missing = saved_rows(SAVED, args.device)
    if wanted("launches", args.only):
        more, why = launch_rows(args.device)
        rows += more
        missing |= why
    return rows, missing


def aims(rows: list[Row]) -> list[dict[str, Any]]:
    """Each target beside what was measured; None where the peer was left out."""
    found: list[dict[str, Any]] = []

    def add(row: Row, what: str, measured: float | None, target: float, met: bool | None) -> None:
        told = {name: row[name] for name in ("case", "backend", "dtype")}
        found.append(told | {"what": what, "measured": measured, "target": target, "met": met})

    for target in TARGETS:
        for row in rows:
            trained = row["pass"] == "forward+backward" and row["dtype"] == target.dtype
            if trained and row["case"].startswith(target.kind) and row["backend"] in OURS_AS_FED:
                ratio = row["speedup_over"].get(target.peer)
                add(row, f"x {target.peer}", ratio, target.ratio, None if ratio is None else ratio >= target.ratio)
    for row in rows:
        for unit in ("bytes_per_element_step", "launches"):
            if unit in row and row["at_most"] is not None:
                add(row, f"{unit}, {row['pass']}", row[unit], row["at_most"], row[unit] <= row["at_most"])
    return found


def print_aims(found: list[dict[str, Any]]) -> None:
    said = {True: "met", False: "NOT MET", None: "not measured"}
    print("case | backend | what | measured | target")
    for aim in found:
        figures = f"{aim['measured']} | {aim['target']} | {said[aim['met']]}"
        print(f"{aim['case']} | {aim['backend']} {aim['dtype']} | {aim['what']} | {figures}")


def main(args: Args) -> None:
    """Check, time, print the table, the targets and the JSON line; exit code 1 when one of ours is wrong."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if args.rounds < 2 or args.threads < 1:
        raise UserError(f"--rounds, --threads: expected at least 2, 1, got {args.rounds}, {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds = min(args.rounds, QUICK_ROUNDS) if args.quick else args.rounds
    print(HEADER)
    rows, missing = (cuda_rows if args.device == "cuda" else cpu_rows)(args, rounds)
    more, why = count_rows(args)
    rows, missing = rows + more, missing | why
    if not rows and not missing:
        raise UserError(f"--only {' '.join(args.only)}: no case is called so")
    found = aims(rows)
    print_aims(found)
    told = {"commit": commit(), "machine": machine(args.threads), "missing": missing, "rows": rows, "targets": found}
    text = json.dumps({"bench": "convlstm"} | told)
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if ours_failed(rows):
        raise SystemExit(1)


def ours_failed(rows: list[Row]) -> bool:
    return any(row.get("ours") and not row.get("valid", True) for row in rows)


if __name__ == "__main__":
    run_command(main, Args)
