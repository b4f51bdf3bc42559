"""Time the ConvLSTM beside what users have: a layer, its gates alone, four networks at once, the bytes it keeps.

    python bench/convlstm.py [--device cpu|cuda] [--json F] [--quick]

Contenders of a case run in turns, compiled and warmed up before. Each is first checked against the reference in
float64, on inputs that all dtypes hold exactly: ours to the kernels' limits, peers to twice those. Ratios are like for
like, bfloat16 over bfloat16. % of limit: the time of the work at the best rate that a bare convolution or GEMM (FLOPs)
and a copy (bytes) reached in between, the longer of the two. Saved bytes are those that autograd holds from forward to
backward, for each element and step (one of B*T*C*H*W). convlstm_peers says who the peers of the layer are.

The gates are the pointwise part of a step: a (B,4C,H,W), c_prev -> h, c and dh, dc -> da, dc_prev, with dense inputs in
the layout of a layer. Peers: through torch's autograd; `by hand`, with as few of torch's operators as it takes; both
compiled. In 16 bits the peers' cells have 16 bits too, ours 32. GB/s are of the bytes that the fused form moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from convlstm_layer import (
    PASSES,
    Layer,
    Shape,
    checked,
    differences,
    layer_rows,
    name_of,
    rounded,
    solved,
)
from convlstm_peers import BF16, F32, compiled, cpu_forms, cuda_forms, mine, network_forms, peers, pointwise
from harness import Bench, Contender, DeviceArgs, Row, compare, copy_limit
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlv2v import _native
from rlv2v.cli import run_command
from rlv2v.kernels.layout import CODES, gates_dtype

CPU_SHAPES = [Shape(4, 8, 32, 32, 32, 32), Shape(2, 8, 16, 16, 64, 64), Shape(4, 8, 128, 128, 8, 8)]
GPU_SIDES = {32: 32, 64: 16, 128: 8, 256: 8}
"""Side of the frames by channels."""
GPU_SHAPES = [Shape(batch, 8, c, c, side, side) for c, side in GPU_SIDES.items() for batch in (1, 2, 4, 16)]
SAVED_SHAPE = Shape(2, 8, 16, 16, 16, 16)
NETWORKS = 4
Step = Callable[[], tuple[Tensor, ...]]
Function = Callable[..., tuple[Tensor, ...]]


def saved_bytes(run: Callable[[], Tensor], inputs: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves in `run`, but for those of `inputs`; a storage counts once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other one gets its address meanwhile
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def saved_rows(shape: Shape, device: str = "cpu") -> list[Row]:
    """Return the rows of saved bytes, of eager and of ours."""
    backend = "cpu" if device == "cpu" else "triton"
    forms = [*peers("eager", F32, lambda run: run, [""]), *peers("eager", BF16, lambda run: run, [""])]
    for dtype in (F32, BF16, torch.float16):
        forms += [mine(backend, dtype, "frame-major"), mine(backend, dtype, "frame-major recompute")]
    rows = list[Row]()
    for form in forms:
        layer = Layer(form, [solved(shape, device)], device)
        ((leaves, _, _),) = layer.networks
        each = round(saved_bytes(partial(layer.run, leaves), leaves) / shape.elements, 2)
        row: Row = {"case": f"saved {shape}", "backend": form.backend or form.name, "ours": bool(form.backend)}
        row |= {"pass": "recompute" if "recompute" in form.name else "store", "dtype": name_of(form.dtype)}
        rows.append(row | {"bytes_per_element_step": each})
    return rows


def moved_bytes(elements: int, dtype: torch.dtype) -> int:
    """Return the bytes that the fused form moves.

    Forward: a, c_prev read, h, c, gates written. Backward: dh, dc, gates, c, c_prev read, da, dc_prev written.
    """
    size, of_gates, cell = dtype.itemsize, gates_dtype(dtype).itemsize, 4
    forward = 4 * size + cell + size + cell + 4 * of_gates
    backward = size + cell + 4 * of_gates + cell + cell + 4 * size + cell
    return elements * (forward + backward)


def by_autograd(cell: Function, inputs: tuple[Tensor, ...]) -> Step:
    """Return the step that computes `h, c, da, dc_prev` through torch's autograd."""
    a, c_prev, dh, dc = inputs
    a, c_prev = a.clone().requires_grad_(), c_prev.clone().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        h, c = cell(a, c_prev)
        return h, c, *torch.autograd.grad((h, c), (a, c_prev), (dh, dc))

    return step


def forward_by_hand(a: Tensor, c_prev: Tensor) -> tuple[Tensor, ...]:
    """Return `h, c`, the activated gates and tanh c."""
    channels = c_prev.shape[1]
    sigmoids, g = a[:, : 3 * channels].sigmoid(), a[:, 3 * channels :].tanh()
    i, f, o = sigmoids.chunk(3, 1)
    c = torch.addcmul(i * g, f, c_prev)
    tanh_c = c.tanh()
    return o * tanh_c, c, sigmoids, g, tanh_c


def backward_by_hand(
    dh: Tensor, dc: Tensor, c_prev: Tensor, sigmoids: Tensor, g: Tensor, tanh_c: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `da, dc_prev`."""
    i, f, o = sigmoids.chunk(3, 1)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    d_sigmoids = torch.cat((dc * g, dc * c_prev, dh * tanh_c), 1)
    return torch.cat((d_sigmoids * sigmoids * (1 - sigmoids), dc * i * (1 - g * g)), 1), dc * f


def by_hand(forward: Function, backward: Function, inputs: tuple[Tensor, ...]) -> Step:
    """Return the step that computes `h, c, da, dc_prev` without autograd."""
    a, c_prev, dh, dc = inputs

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            h, c, *saved = forward(a, c_prev)
            return h, c, *backward(dh, dc, c_prev, *saved)

    return step


def fused(inputs: tuple[Tensor, ...]) -> Step:
    """Return our step: a, dh of the dtype, c_prev and dc float32, channels-last."""
    a, c_prev, dh, dc = (tensor.contiguous(memory_format=torch.channels_last) for tensor in inputs)
    batch, channels, height, width = c_prev.shape
    code, rows = CODES[a.dtype], batch * height * width

    def step() -> tuple[Tensor, ...]:
        h, c, gates = torch.empty_like(dh), torch.empty_like(c_prev), torch.empty_like(a, dtype=gates_dtype(a.dtype))
        threads = torch.get_num_threads()
        _native.gates_forward(
            code, rows, channels, a.data_ptr(), 0, c_prev.data_ptr(),
            h.data_ptr(), c.data_ptr(), gates.data_ptr(), threads,
        )  # fmt: skip
        da, dc_prev = torch.empty_like(a), torch.empty_like(c_prev)
        _native.gates_backward(
            code, True, rows, channels, dh.data_ptr(), 0, 0, dc.data_ptr(), gates.data_ptr(), c.data_ptr(),
            c_prev.data_ptr(), da.data_ptr(), dc_prev.data_ptr(), threads,
        )  # fmt: skip
        return h, c, da, dc_prev

    return step


def gates_contenders(shape: Shape, *, with_compiled: bool) -> list[Contender]:
    """Return all contenders of a shape in both dtypes, checked against float64: h by value, the others by norms."""
    rng = torch.Generator().manual_seed(0)
    state = (shape.batch, shape.channels, shape.height, shape.width)
    sizes = ((shape.batch, 4 * shape.channels, *state[2:]), state, state, state)
    exact_inputs = tuple(rounded(torch.randn(*size, generator=rng)) for size in sizes)
    exact, contenders = by_autograd(pointwise, exact_inputs)(), list[Contender]()
    for dtype in (F32, BF16):
        inputs = tuple(tensor.to(dtype) for tensor in exact_inputs)
        a, c_prev, dh, dc = inputs
        steps = {
            "eager": by_autograd(pointwise, inputs),
            "eager by hand": by_hand(forward_by_hand, backward_by_hand, inputs),
        }
        if with_compiled:
            torch._dynamo.reset()
            steps["compile"] = by_autograd(compiled(pointwise), inputs)
            steps["compile by hand"] = by_hand(compiled(forward_by_hand), compiled(backward_by_hand), inputs)
        steps["cpu"] = fused((a, c_prev.float(), dh, dc.float()))
        work = {"gb_s": float(moved_bytes(shape.elements // shape.steps, dtype))}
        for name, step in steps.items():
            group = "compiled" if name.startswith("compile") else ""
            contender = Contender(name, step, name_of(dtype), work, ours=name == "cpu", group=group)
            h, *others = zip(step(), exact, strict=True)
            contenders.append(checked(contender, differences([h], others), dtype))
        contenders.append(copy_limit(work["gb_s"], name_of(dtype)))
    return contenders


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
                forms = network_forms(dtype, ("triton", "cuda"))
                bench.add(layer_rows(bench, shape, forms, rounds, device="cuda", networks=NETWORKS))
        bench.add(saved_rows(SAVED_SHAPE, args.device))


if __name__ == "__main__":
    run_command(main, DeviceArgs)
