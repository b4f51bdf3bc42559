"""Compile every Triton kernel that the tile table can select, without a GPU, and print what each needs of one.

    python -m rlv2v.kernels.aot [--arch 80 86 89 90 100 120] [--json F]
The backend runs on tensors without storage, its launches are recorded, and each distinct one is compiled for each
architecture. Registers, local memory and stack are read off the compiled kernel by the cuobjdump in Triton's package.
Exits with 1 if a kernel spills, or takes more shared memory than its architecture has for a program. The CUDA kernels
inside rlv2v._native are listed as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels.driver import BackwardOperands
from rlv2v.kernels.layout import empty_frames, gates_dtype
from rlv2v.kernels.triton import norms, slices
from rlv2v.kernels.triton.recurrence import DTYPES, Launch, TritonRecurrence, interpreted
from rlv2v.kernels.triton.tiles import KIB, SHARED_LIMIT, Tile

# 3 is masked without vectors; 8, 16, 24 are the default's; one of each row of the tile table, the last with two sums.
CHANNELS = (3, 8, 16, 24, 32, 64, 256)
BINS = (6, 8)  # of a bilateral grid
POOLS = ((1, 1), (2, 2))  # of the end of a block
NORM_CALLS = ("none", "start", "state")  # without a normalisation, of a video's first frames, and of later ones
WIDTHS = (4, 64)  # of square frames: a step of few programs and one of many
# (state, keep gates, dcs, activated): training, training with a state, and with gates computed anew.
CALLS = ((False, True, False, True), (True, True, True, True), (True, False, True, False))
TYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# A kernel's dtype is that of the first of these that it takes.
FRAMES = ("values", "x", "d_weight_bias", "weight", "dhs", "a", "frames")
# Of a multiprocessor: shared memory, threads, programs. Each has 64K registers and keeps 1 KiB a program for itself.
MULTIPROCESSOR = {
    80: (164 * KIB, 2048, 32),
    86: (100 * KIB, 1536, 16),
    89: (100 * KIB, 1536, 24),
    90: (228 * KIB, 2048, 32),
    100: (228 * KIB, 2048, 32),
    120: (100 * KIB, 1536, 24),
}
REGISTERS, WARP = 65536, 32


@dataclass(frozen=True)
class LaunchedKernel:
    """A kernel as it is launched: what Triton's compiler takes, by parameter name."""

    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def case(self) -> str:
        """C, k, tile, and what sets this kernel apart from the others of its name."""
        constants, options = dict(self.constants), dict(self.options)
        if "BINS" in constants:
            return f"bins {constants['BINS']}, {constants['BLOCK']} pixels" + ", backward" * bool(
                constants.get("BACKWARD")
            )
        missing = [f"no {name}" for name, value in self.constants if value is None]
        if "BM" not in constants:
            window = f"window {constants['DOWN']}x{constants['RIGHT']}" if "DOWN" in constants else ""
            return " ".join((f"C {constants['BC']} at once", *[window] * bool(window), *missing))
        tile = "x".join(str(constants[name]) for name in ("BM", "BC", "BK") if name in constants)
        flags = [name.lower() for name, value in self.constants if value is True and name != "ACTIVATED"]
        recomputed = ["recomputed"] if constants.get("ACTIVATED") is False else []
        stages = options.get("num_stages", "-")
        return " ".join((f"C{constants['C']} k{constants['K']} {tile} s{stages}", *missing, *flags, *recomputed))

    @property
    def dtype(self) -> str:
        return next(kind for frames in FRAMES for name, kind in self.signature if name == frames).removeprefix("*")


@dataclass(frozen=True)
class Row:
    """What a compiled kernel needs: registers a thread, bytes, programs a multiprocessor, tensor core products."""

    arch: int
    kernel: str
    dtype: str
    case: str
    registers: int
    local_bytes: int
    shared_bytes: int
    ctas: int
    tensor_core_products: int

    def faults(self) -> list[str]:
        """Return why the kernel must not be used as it is, if at all."""
        over = self.shared_bytes > SHARED_LIMIT[self.arch]
        return ["spills"] * (self.local_bytes > 0) + [f"more than {SHARED_LIMIT[self.arch]} B of shared memory"] * over


def launched_kernels(
    arch: int, channels: Iterable[int], sizes: Iterable[int], dtypes: Iterable[torch.dtype], tile: Tile | None = None
) -> list[LaunchedKernel]:
    """Return every distinct kernel that the backend launches for these shapes in the usual calls."""
    launched: dict[LaunchedKernel, None] = {}

    def record(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        launched[describe_launch(kernel, arguments, arch)] = None

    backend = TritonRecurrence(record, (arch // 10, arch % 10), tile)
    for c, k, dtype, width, call in product(channels, sizes, dtypes, WIDTHS, CALLS):
        for tf32 in (False, True)[: 1 + (dtype == torch.float32)]:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                run_without_storage(backend, c, k, dtype, width, *call)
    for bins, dtype in product(BINS, dtypes):
        grid, guide, frames = (
            torch.empty(1, *shape, dtype=dtype, device="meta") for shape in ((12, bins, 4, 4), (64, 64), (3, 64, 64))
        )
        slices.forward(grid, guide, frames, record)
        slices.backward(grid, guide, frames, frames, [True] * 3, record)
    for c, dtype, pool, kind in product(channels, dtypes, POOLS, NORM_CALLS):
        run_norm_without_storage(c, dtype, pool, kind, record)
    return list(launched)


def run_norm_without_storage(c: int, dtype: torch.dtype, pool: tuple[int, int], call: str, run: Launch) -> None:
    """Run the end of a block, forward and backward, on tensors of the meta device."""
    x = torch.empty(2, 2, c, 8, 8, dtype=dtype, device="meta")
    small = torch.empty(2, 2, c, 8 // pool[0], 8 // pool[1], dtype=dtype, device="meta")
    weight = torch.empty(c, device="meta")
    moments = torch.empty(2, 2, c, dtype=torch.float64, device="meta")
    counts, state = moments[..., 0], moments[0]
    pooled = small if pool != (1, 1) else None
    sizes, numbers = (2, 2, c, 8, 8, *pool), {"slope": 0.2, "eps": 1e-3}
    tensors: dict[str, Any] = {"x": x, "residual": x, "activated": x, "pooled": pooled}
    before = {"frames": counts[0], "mean": state, "square": state} if call != "start" else {}
    if call != "none":
        tensors |= {"weight": weight, "bias": weight, "y": small, **before}
        tensors |= {"counts": counts, "means": moments, "squares": moments}
    norms.forward(sizes, numbers, tensors, run)
    tensors = {"activated": x, "values": small, "dy": small, "dx": x, "d_activated": None if call == "none" else x}
    if call != "none":
        tensors |= {"weight": weight, "d_weight": weight, "d_bias": weight, "means": moments, "squares": moments}
    if before:
        tensors |= {"frames": counts[0], "d_mean": state, "d_square": state, "d_means": moments, "d_squares": moments}
    norms.backward(sizes, numbers, tensors, run)


def run_without_storage(backend: TritonRecurrence, c: int, k: int, dtype: torch.dtype, width: int, *call: bool) -> None:
    """Run two steps, forward and backward, on tensors of the meta device."""
    has_state, keep, has_dcs, activated = call
    empty = torch.empty(0, device="meta")
    state = (1, 2, c, width, width)
    a = empty_frames(empty, 1, 2, 2, 4 * c, width, width, dtype=dtype)
    w_h = torch.empty(1, 4 * c, c, k, k, dtype=dtype, device="meta")
    bias = torch.empty(1, 4 * c, dtype=dtype, device="meta")
    h0 = empty_frames(empty, *state, dtype=dtype) if has_state else None
    c0 = empty_frames(empty, *state, dtype=torch.float32) if has_state else None
    hs, cs, _ = backend.recur(a, w_h, h0, c0, keep, bias)
    gates = a.view(gates_dtype(dtype)) if activated else a
    backend.backward(BackwardOperands(hs, cs if has_dcs else None, gates, activated, cs, c0, w_h, True))


def describe_launch(kernel: Any, arguments: dict[str, Any], arch: int) -> LaunchedKernel:
    """Return what Triton's just-in-time compiler makes of a launch."""
    signature, constants = [], []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        else:
            kind = f"*{TYPE_NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            signature.append((parameter.name, kind))
    options = [(name, value) for name, value in arguments.items() if name not in kernel.arg_names]
    return LaunchedKernel(kernel.__name__, arch, tuple(signature), tuple(constants), tuple(sorted(options)))


def compile_kernel(launched: LaunchedKernel) -> Row:
    """Compile one kernel and read what it needs; an allocation is aligned to 16 bytes and more."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlv2v.kernels.triton import kernels, norm_kernels, slice_kernels

    modules = (kernels, slice_kernels, norm_kernels)
    kernel = next(getattr(module, launched.kernel) for module in modules if hasattr(module, launched.kernel))
    signature = dict(launched.signature)
    pointers = [index for index, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(kernel, signature, dict(launched.constants), attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", launched.arch, WARP), options=dict(launched.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(file.name)
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    return Row(
        launched.arch,
        launched.kernel,
        launched.dtype,
        launched.case,
        registers=usage["REG"],
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=shared,
        ctas=ctas_per_multiprocessor(launched.arch, usage["REG"], shared, warps),
        tensor_core_products=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", binary.asm["ptx"])),
    )


def ctas_per_multiprocessor(arch: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs fit one multiprocessor at once; a warp gets registers in units of 256."""
    memory, threads, programs = MULTIPROCESSOR[arch]
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256 * warps)
    return min(by_registers, memory // (shared + KIB), threads // (WARP * warps), programs)


def resource_usage(path: str) -> list[dict[str, Any]]:
    """Return for each kernel in a cubin, object or library its name (`function`) and REG, STACK, SHARED, LOCAL."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True)
    # A library without device code makes cuobjdump fail with these words.
    if shown.returncode and "does not contain device code" not in shown.stdout + shown.stderr:
        raise RuntimeError(f"cuobjdump {path}: {(shown.stdout + shown.stderr).strip()}")
    rows, arch = [], ""
    for line in shown.stdout.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match[1]
        if match := re.match(r"\s*Function (\S+):", line):
            rows.append({"function": match[1], "arch": arch})
        elif "REG:" in line:
            rows[-1] |= {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return rows


def print_row(row: Row | None) -> None:
    """Print one line of the table, or its head for None."""
    cells: tuple[Any, ...] = "arch", "kernel", "dtype", "registers", "local B", "shared B", "CTAs/SM", "mma", "case"
    if row is not None:
        needs = (row.registers, row.local_bytes, row.shared_bytes, row.ctas, row.tensor_core_products)
        case = row.case + "".join(f"  <- {fault}" for fault in row.faults())
        cells = (row.arch, row.kernel, row.dtype, *needs, case)
    print("{:>4} {:<14} {:<5} {:>9} {:>7} {:>8} {:>7} {:>4}  {}".format(*cells), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rlv2v.kernels.aot", description=__doc__.splitlines()[0])
    names, table = [TYPE_NAMES[dtype] for dtype in DTYPES], ("BM", "BC", "BK", "STAGES")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="C, channels of the state")
    parser.add_argument("--kernel-size", type=int, nargs="+", default=(3,), help="k, width of w_h")
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument("--tile", type=int, nargs=4, metavar=table, help="instead of the table's")
    parser.add_argument("--only", default="", help="kernels whose name and case hold this regular expression")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    if find_spec("triton") is None:
        parser.error("triton is not installed")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    tile = None
    if args.tile:
        bm, bc, bk, num_stages = args.tile
        tile = Tile(bm, bc, bk, num_stages=num_stages)
    dtypes = [dtype for dtype in DTYPES if TYPE_NAMES[dtype] in args.dtype]
    shapes = (args.channels, args.kernel_size, dtypes)
    launched = [kernel for arch in args.arch for kernel in launched_kernels(arch, *shapes, tile)]
    launched = [one for one in launched if re.search(args.only, f"{one.kernel} {one.case}")]
    rows = []
    print_row(None)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(compile_kernel, launched):
            print_row(row)
            rows.append(row)
    native = resource_usage(_native.__file__)
    print("CUDA kernels in rlv2v._native:" + ("" if native else " none built"))
    for usage in native:
        print(
            "  {arch} {REG} registers, {STACK} B stack, {LOCAL} B local, {SHARED} B shared  {function}".format(**usage)
        )
    faulty = [row for row in rows if row.faults()]
    print(f"{len(rows)} kernels, {len(faulty)} with faults")
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "native": native}) + "\n")
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
