"""Compile every Triton kernel that the tile table can choose, with no GPU, and read what it needs of one.

    python -m rlv2v.kernels.aot [--arch 86 90] [--json F]
The backend runs on tensors without storage and its launches are recorded; each distinct one is compiled for each
architecture. Registers, local memory and stack are what the cuobjdump in Triton's package finds in the compiled kernel.
Leaves with 1 when a kernel spills, or takes more shared memory than its architecture has for a program. Lists the CUDA
kernels inside rlv2v._native beside them.
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

from rlv2v.kernels.layout import empty_frames
from rlv2v.kernels.triton.recurrence import DTYPES, TritonRecurrence, interpreted
from rlv2v.kernels.triton.tiles import KIB, SHARED_LIMIT, Tile

CHANNELS = (
    3,
    16,
    32,
    64,
    256,
)  # masked, no vectors; then one of each row of the table, the last row with a short and a long sum
KERNEL_SIZES = (3,)
WIDTHS = (4, 64)  # of square frames: a step of few programs and one of many
# As (h0, c0, keep gates, dcs, activated): training, training with a state, and with gates computed anew.
CALLS = ((False, False, True, False, True), (True, True, True, True, True), (True, True, False, True, False))
TYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Of a multiprocessor: shared memory, threads, programs. Each has 64K registers and keeps 1 KiB a program for itself.
MULTIPROCESSOR = {86: (100 * KIB, 1536, 16), 90: (228 * KIB, 2048, 32)}
REGISTERS, WARP = 65536, 32


@dataclass(frozen=True)
class Config:
    """A kernel as it is launched: what Triton's compiler takes, by parameter name."""

    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def named(self) -> dict[str, Any]:
        return dict(self.constants)

    def case(self) -> str:
        """C, k, tile, and what sets this kernel apart from the others of its name."""
        constants, options = self.named(), dict(self.options)
        tile = "x".join(str(constants[name]) for name in ("BM", "BC", "BK") if name in constants)
        missing = [f"no {name}" for name, value in self.constants if value is None]
        flags = [name.lower() for name, value in self.constants if value is True and name != "ACTIVATED"]
        recomputed = ["recomputed"] if constants.get("ACTIVATED") is False else []
        stages = options.get("num_stages", "-")
        return " ".join((f"C{constants['C']} k{constants['K']} {tile} s{stages}", *missing, *flags, *recomputed))

    def dtype(self) -> str:
        return next(kind for name, kind in self.signature if name in ("weight", "dhs", "a")).removeprefix("*")


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
        over = self.shared_bytes > SHARED_LIMIT[self.arch]
        return ["spills"] * (self.local_bytes > 0) + [f"more than {SHARED_LIMIT[self.arch]} B of shared memory"] * over


def recorded(
    arch: int,
    channels: Iterable[int],
    sizes: Iterable[int],
    dtypes: Iterable[torch.dtype],
    tile: Tile | None = None,
    every_option: bool = False,
) -> list[Config]:
    """Every distinct kernel that the backend launches for these shapes, in the usual calls or in every possible one."""
    found: dict[Config, None] = {}

    def record(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        found[config_of(kernel, arguments, arch)] = None

    backend = TritonRecurrence(record, (arch // 10, arch % 10), tile)
    calls = product((True, False), repeat=5) if every_option else CALLS
    for c, k, dtype, width, call in product(channels, sizes, dtypes, WIDTHS, calls):
        run_on(backend, c, k, dtype, width, *call)
    return list(found)


def run_on(backend: TritonRecurrence, c: int, k: int, dtype: torch.dtype, width: int, *call: bool) -> None:
    """A sequence of two steps, forward and backward, on tensors without storage."""
    has_h0, has_c0, keep, has_dcs, activated = call
    empty = torch.empty(0, device="meta")
    state = (1, 2, c, width, width)
    a = empty_frames(empty, 1, 2, 2, 4 * c, width, width, dtype=dtype)
    w_h = torch.empty(1, 4 * c, c, k, k, dtype=dtype, device="meta")
    bias = torch.empty(1, 4 * c, dtype=dtype, device="meta")
    h0 = empty_frames(empty, *state, dtype=dtype) if has_h0 else None
    c0 = empty_frames(empty, *state, dtype=torch.float32) if has_c0 else None
    hs, cs, _ = backend.recur(a, w_h, h0, c0, keep, bias)
    gates = a.view(torch.float16) if activated and dtype == torch.bfloat16 else a
    backend.backward(hs, cs if has_dcs else None, gates, activated, cs, c0, w_h, True)


def config_of(kernel: Any, arguments: dict[str, Any], arch: int) -> Config:
    """What Triton's just-in-time compiler makes of a launch; an allocation is aligned to 16 bytes and more."""
    signature, constants = [], []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, f"*{TYPE_NAMES[value.dtype]}"))
        else:
            signature.append((parameter.name, "i32"))
    options = [(name, value) for name, value in arguments.items() if name not in kernel.arg_names]
    return Config(kernel.__name__, arch, tuple(signature), tuple(constants), tuple(sorted(options)))


def compiled(config: Config) -> Row:
    """Compile one kernel and read its needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlv2v.kernels.triton import kernels

    kernel = getattr(kernels, config.kernel)
    signature = dict(config.signature)
    pointers = [index for index, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(kernel, signature, config.named(), attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", config.arch, WARP), options=dict(config.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        (usage,) = resource_usage(file.name)
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    return Row(
        config.arch,
        config.kernel,
        config.dtype(),
        config.case(),
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        shared,
        ctas_per_multiprocessor(config.arch, usage["REG"], shared, warps),
        len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", binary.asm["ptx"])),
    )


def ctas_per_multiprocessor(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many programs fit one multiprocessor at once; registers are given to a warp in units of 256."""
    memory, threads, programs = MULTIPROCESSOR[arch]
    by_registers = REGISTERS // (-(-registers * WARP // 256) * 256 * warps)
    return min(by_registers, memory // (shared + KIB), threads // (WARP * warps), programs)


def bundled(name: str) -> str:
    """One of the CUDA programs inside the Triton package."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resource_usage(path: str) -> list[dict[str, Any]]:
    """Of each kernel in a cubin, object or library: its name (`function`) and REG, STACK, SHARED, LOCAL."""
    shown = subprocess.run([bundled("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True)
    # A library without device code makes cuobjdump fail with these words.
    if shown.returncode and "does not contain device code" not in shown.stdout + shown.stderr:
        raise RuntimeError(f"cuobjdump {path}: {(shown.stdout + shown.stderr).strip()}")
    rows, arch = [], ""
    for line in shown.stdout.splitlines():
        if found := re.match(r"\s*arch = (\w+)", line):
            arch = found[1]
        if found := re.match(r"\s*Function (\S+):", line):
            rows.append({"function": found[1], "arch": arch})
        elif "REG:" in line:
            rows[-1] |= {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return rows


def native_kernels() -> list[dict[str, Any]]:
    """The CUDA kernels inside the extension; none when it was built without, or not at all."""
    native = find_spec("rlv2v._native")
    return resource_usage(native.origin) if native and native.origin else []


def print_row(row: Row | None) -> None:
    """One line of the table, or its head."""
    form = "{:>4} {:<14} {:<5} {:>9} {:>7} {:>8} {:>7} {:>4}  {}"
    if row is None:
        line = form.format("arch", "kernel", "dtype", "registers", "local B", "shared B", "CTAs/SM", "mma", "case")
    else:
        numbers = (row.registers, row.local_bytes, row.shared_bytes, row.ctas, row.tensor_core_products)
        faults = "".join(f"  <- {fault}" for fault in row.faults())
        line = form.format(row.arch, row.kernel, row.dtype, *numbers, row.case + faults)
    print(line, flush=True)


def print_native(native: list[dict[str, Any]]) -> None:
    print("CUDA kernels in rlv2v._native:" + ("" if native else " none built"))
    form = "  {arch} {REG} registers, {STACK} B stack, {LOCAL} B local, {SHARED} B shared  {function}"
    for usage in native:
        print(form.format(**usage))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rlv2v.kernels.aot", description=__doc__.splitlines()[0])
    names = list(TYPE_NAMES.values())
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="C, channels of the state")
    parser.add_argument("--kernel-size", type=int, nargs="+", default=KERNEL_SIZES, help="k, width of w_h")
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
    parser.add_argument(
        "--tile", type=int, nargs=4, metavar=("BM", "BC", "BK", "STAGES"), help="instead of the table's"
    )
    parser.add_argument("--every-option", action="store_true", help="every kernel of a shape: twice as many and more")
    parser.add_argument("--only", default="", help="kernels whose name and case hold this regular expression")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    if find_spec("triton") is None:
        parser.error("triton is not installed")
    if interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tile = None
    if args.tile:
        bm, bc, bk, stages = args.tile
        tile = Tile(bm, bc, bk, num_stages=stages)
    dtypes = [dtype for dtype in DTYPES if TYPE_NAMES[dtype] in args.dtype]
    shapes = (args.channels, args.kernel_size, dtypes)
    configs = [config for arch in args.arch for config in recorded(arch, *shapes, tile, args.every_option)]
    configs = [config for config in configs if re.search(args.only, f"{config.kernel} {config.case()}")]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        print_row(None)
        rows = []
        for row in pool.map(compiled, configs):
            print_row(row)
            rows.append(row)
    native = native_kernels()
    print_native(native)
    faulty = [row for row in rows if row.faults()]
    print(f"{len(rows)} kernels, {len(faulty)} with faults")
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "native": native}) + "\n")
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
