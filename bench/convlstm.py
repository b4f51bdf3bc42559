"""Time the ConvLSTM beside what users have: a layer, its gates alone, four networks at once, the bytes it keeps.

    python bench/convlstm.py [--device cpu|cuda] [--json F] [--quick]

Contenders of a case run in turns, compiled and warmed up before. Each is first checked against the reference in
float64, on inputs that all dtypes hold exactly: ours to the kernels' limits, peers to twice those. Ratios are like for
like, bfloat16 over bfloat16. % of limit: the time of the work at the best rate that a bare convolution or GEMM (FLOPs)
and a copy (bytes) reached in between, the longer of the two. Saved bytes are those that autograd holds from forward to
backward, for each element and step (one of B*T*C*H*W). convlstm_peers says who the peers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
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
from convlstm_peers import BF16, F32, cpu_forms, cuda_forms, eager, mine
from harness import CLOCKS, Bench, Contender, DeviceArgs, Row, compare
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlv2v.cli import run_command

CPU_SHAPES = [Shape(4, 8, 32, 32, 32, 32), Shape(2, 8, 16, 16, 64, 64), Shape(4, 8, 128, 128, 8, 8)]
GPU_SIDES = {32: 32, 64: 16, 128: 8, 256: 8}
"""Side of the frames by channels."""
GPU_SHAPES = [Shape(batch, 8, c, c, side, side) for c, side in GPU_SIDES.items() for batch in (1, 2, 4, 16)]
SAVED_SHAPE = Shape(2, 8, 16, 16, 16, 16)
NETWORKS = 4


def saved_bytes(run: Callable[[], Tensor], inputs: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes that autograd saves in `run`: `saved`, and those of `inputs` apart; a storage counts once.

    `with_result` adds the hidden states where they are not among what is saved.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other one gets its address meanwhile
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    sizes = {address: storage.nbytes() for address, storage in storages.items()}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved = sum(size for address, size in sizes.items() if address not in own)
    storage = result.untyped_storage()
    more = 0 if storage.data_ptr() in sizes else storage.nbytes()
    return {"saved": saved, "inputs": sum(sizes.values()) - saved, "with_result": saved + more}


def saved_rows(bench: Bench, shape: Shape, device: str = "cpu") -> list[Row]:
    """Return the rows of saved bytes, of eager and of ours."""
    backend = "cpu" if device == "cpu" else "triton"
    forms = [Form("eager", dtype, eager, joined=True) for dtype in (F32, BF16)]
    for dtype in (F32, BF16, torch.float16):
        forms += [mine(backend, dtype, "frame-major"), mine(backend, dtype, "frame-major recompute")]
    rows = list[Row]()
    for form in runnable(bench, f"saved {shape}", forms, shape, device):
        layer = Layer(form, solved(shape, device), device)
        each = {name: round(size / shape.elements, 2) for name, size in saved_bytes(layer.run, layer.leaves).items()}
        row: Row = {"case": f"saved {shape}", "backend": form.backend or form.name, "ours": bool(form.backend)}
        row |= {"pass": "recompute" if "recompute" in form.name else "store", "dtype": name_of(form.dtype)}
        row |= {"bytes_per_element_step": each["saved"], "bytes_with_result": each["with_result"]}
        rows.append(row | {"bytes_of_inputs": each["inputs"]})
    return rows


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
                calls = [layer.calls[passes] for layer in layers]
                in_turn = lambda calls=calls: [call() for call in calls]  # noqa: E731
                contender = Contender(way, in_turn, name_of(dtype), whole.work(passes, dtype), ours=way != "eager")
                every = [checked(contender, difference, dtype) for difference in differences[way]]
                contenders.append(min(every, key=lambda one: one.valid))
            contenders += limits_of(whole, passes, [dtype], device)
            rows += compare(case, passes, contenders, rounds, CLOCKS[device])
    return rows


def main(args: DeviceArgs) -> None:
    """Time the ConvLSTM against its peers; exit code 1 if one of ours is wrong."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # everybody gets cuDNN's fastest convolution
    with Bench("convlstm", args) as bench:
        rounds, quick = args.num_rounds, args.quick
        for shape in (CPU_SHAPES[:1] if quick else CPU_SHAPES) if args.device == "cpu" else ():
            bench.add(layer_rows(bench, shape, cpu_forms(quick=quick), rounds, PASSES[1:] if quick else PASSES))
            gates = f"gates B{shape.batch} C{shape.channels} {shape.height}x{shape.width}"
            bench.add(compare(gates, PASSES[1], gates_contenders(shape, with_compiled=True), rounds))
        for shape in (GPU_SHAPES[2:3] if quick else GPU_SHAPES) if args.device == "cuda" else ():
            for dtype in (torch.float16, torch.bfloat16):
                bench.add(layer_rows(bench, shape, cuda_forms(dtype, quick=quick), rounds, device="cuda"))
                for backend in ("triton", "cuda"):
                    bench.add(grouped_rows(bench, shape, dtype, backend, rounds))
        bench.add(saved_rows(bench, SAVED_SHAPE, args.device))


if __name__ == "__main__":
    run_command(main, DeviceArgs)
