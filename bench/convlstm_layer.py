"""A ConvLSTM layer to time: its data, its exact result, the forms that run it, and the rows of all forms of a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from harness import CLOCKS, Bench, Contender, Row, compare, copy_limit
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels.dispatch import TABLE
from rlv2v.kernels.driver import Problem
from rlv2v.kernels.layout import gates_dtype, state_dtype
from rlv2v.kernels.reference import LIMITS, convlstm_ref

Run = Callable[..., Tensor]
PASSES = ("forward", "forward+backward")
PEER_SLACK = 2
"""Peers may be this many times our limits off: in 16 bits most keep the cells in 16 bits too."""
GPU_GEMM, GPU_COPY_BYTES = 4096, 2**29
"""Side of a GEMM and bytes of a copy that a GPU runs at its full rate."""


class Shape(NamedTuple):
    """Hold the sizes of a layer."""

    batch: int
    steps: int
    c_in: int
    channels: int
    height: int
    width: int
    kernel: int = 3

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} {self.c_in}->{self.channels} {self.height}x{self.width}"

    @property
    def elements(self) -> int:
        """Return the number of elements of all hidden states."""
        return self.batch * self.steps * self.channels * self.height * self.width

    def work(self, passes: str, dtype: torch.dtype) -> dict[str, float]:
        """Return the FLOPs of the convolutions and the bytes that have to move.

        FLOPs: x over T frames, h over T - 1, as a zero state needs none; three times with the backward. Bytes: x read,
        h and c written; with the backward, gates written and read, dh, h, c, x read, dx written. The weights are small.
        """
        inputs = self.steps * self.c_in + (self.steps - 1) * self.channels
        flops = 2.0 * self.batch * self.height * self.width * 4 * self.channels * self.kernel**2 * inputs
        x, h = (self.elements // self.channels * n * dtype.itemsize for n in (self.c_in, self.channels))
        c, gates = self.elements * state_dtype(dtype).itemsize, 4 * self.elements * gates_dtype(dtype).itemsize
        if passes == "forward":
            return {"gflop_s": flops, "gb_s": x + h + c}
        return {"gflop_s": 3 * flops, "gb_s": 3.0 * x + 3 * h + 2 * c + 2 * gates}


class Data(NamedTuple):
    """Hold a layer's arguments, the gradient of its result, and what the float64 reference makes of them."""

    x: Tensor
    w_x: Tensor
    w_h: Tensor
    bias: Tensor
    dhs: Tensor
    exact: tuple[Tensor, ...]  # hs, and the gradients of x, w_x, w_h, bias


def rounded(tensor: Tensor) -> Tensor:
    """Return float64 values that bfloat16 and float16 hold, so that all contenders get the same numbers."""
    return tensor.bfloat16().half().double()


def solved(shape: Shape, device: str = "cpu", seed: int = 0) -> Data:
    """Return unit-sized random data, with weights that keep the pre-activations unit-sized, and the exact result."""
    rng = torch.Generator().manual_seed(seed)
    b, t, c_in, c, h, w, k = shape
    scale = ((c_in + c) * k * k) ** -0.5
    sizes = ((b, t, c_in, h, w), (4 * c, c_in, k, k), (4 * c, c, k, k), (4 * c,), (b, t, c, h, w))
    scales = (1.0, scale, scale, 1.0, 1.0)
    tensors = [rounded(torch.randn(size, generator=rng) * s) for size, s in zip(sizes, scales, strict=True)]
    *leaves, dhs = (tensor.to(device, copy=True) for tensor in tensors)
    x, w_x, w_h, bias = (leaf.requires_grad_() for leaf in leaves)
    hs, _ = convlstm_ref(x, w_x, w_h, bias, None, None)
    return Data._make([*tensors, (hs.detach(), *torch.autograd.grad(hs, leaves, dhs))])


def stacked(data: list[Data]) -> Data:
    """Return several layers of one shape as one with a leading group axis."""
    *tensors, exact = zip(*data, strict=True)
    return Data._make([*map(torch.stack, tensors), tuple(map(torch.stack, zip(*exact, strict=True)))])


def frame_major(frames: Tensor) -> Tensor:
    """Return (...,B,T,C,H,W) dense in the order T,B,H,W,C, as our layers hand it on; itself if it is so."""
    return frames.transpose(-5, -4).movedim(-3, -1).contiguous().movedim(-1, -3).transpose(-5, -4)


def swap_gates(weight: Tensor) -> Tensor:
    """Return (4C,...) with gates i, f, o, g as i, f, g, o and back, in the same memory format."""
    i, f, o, g = weight.chunk(4)
    return torch.empty_like(weight).copy_(torch.cat((i, f, g, o)))


@dataclass(frozen=True)
class Form:
    """Describe one way to run the layer."""

    name: str
    dtype: torch.dtype
    run: Run  # x, then w_x and w_h or, `joined`, one weight of both, then the bias, to hs
    joined: bool = False
    leaves: torch.dtype | None = None  # dtype of x and the weights where it is not `dtype`: autocast
    channels_last: bool = False
    frame_major: bool = False
    cell_order: bool = False  # gates i, f, g, o in the weights, as in aten's LSTM cell
    backend: str = ""  # of rlv2v.kernels; empty for a peer
    group: str = ""
    training_only: bool = False  # differs from another form in the backward alone
    graphs: bool = False  # runs in CUDA graphs, whose results the next call overwrites


class Layer:
    """Run a form on its own copy of the arguments."""

    def __init__(self, form: Form, data: Data, device: str = "cpu") -> None:
        self.form, self.exact = form, data.exact
        weights = [torch.cat((data.w_x, data.w_h), 1)] if form.joined else [data.w_x, data.w_h]
        if form.channels_last or form.frame_major:
            weights = [weight.movedim(-3, -1).contiguous().movedim(-1, -3) for weight in weights]
        weights = [swap_gates(weight) if form.cell_order else weight for weight in (*weights, data.bias)]
        x, dhs = (frame_major(tensor) if form.frame_major else tensor for tensor in (data.x, data.dhs))
        dtype = form.leaves or form.dtype  # `to` keeps the strides
        self.leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in (x, *weights)]
        self.dhs = dhs.to(device, form.dtype)
        self.calls: dict[str, Callable[[], object]] = {"forward": self.forward, "forward+backward": self.train}

    def run(self) -> Tensor:
        """Return hs."""
        if self.form.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.form.run(*self.leaves)

    def forward(self) -> Tensor:
        """Return hs without keeping anything for a backward, as in translation."""
        with torch.no_grad():
            return self.run()

    def train(self) -> tuple[Tensor, ...]:
        """Return hs and the gradients of x and all weights."""
        hs = self.run()
        return hs, *torch.autograd.grad(hs, self.leaves, self.dhs)

    def check(self) -> dict[str, float]:
        """Return the differences of both passes from the exact result."""
        alone = self.forward().clone()
        hs, dx, *dw = self.train()
        if self.form.cell_order:
            dw = [swap_gates(gradient) for gradient in dw]
        if self.form.joined:
            c_in = self.leaves[0].shape[2]
            dw = [dw[0][:, :c_in], dw[0][:, c_in:], dw[1]]
        return differences((alone, hs, dx, *dw), (self.exact[0], *self.exact), num_values=2)


def differences(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...], num_values: int) -> dict[str, float]:
    """Return the largest absolute difference of the first tensors, and ratio of norms of the others, the gradients."""
    pairs = [(a.detach().double().cpu(), b.double().cpu()) for a, b in zip(actual, exact, strict=True)]
    value = torch.stack([(a - b).abs().max() for a, b in pairs[:num_values]]).max()
    gradient = torch.stack([(a - b).norm() / b.norm() for a, b in pairs[num_values:]]).max()
    return {"value": value.item(), "gradient": gradient.item()}


def checked(contender: Contender, difference: dict[str, float], dtype: torch.dtype) -> Contender:
    """Return the contender, valid if its differences are within the kernels' limits, twice those for a peer."""
    slack, limit = (1 if contender.ours else PEER_SLACK), LIMITS[dtype]
    valid = difference["value"] <= slack * limit.value and difference["gradient"] <= slack * limit.gradient
    return replace(contender, valid=valid, fields={"difference": difference})


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def runnable(bench: Bench, case: str, forms: Iterable[Form], shape: Shape, device: str, groups: int = 1) -> list[Form]:
    """Return the forms that can run a shape; record why a backend of ours cannot."""
    b, t, _, c, h, w, k = shape
    can = []
    for form in forms:
        reason = None
        if form.backend:
            problem = Problem(torch.device(device), form.dtype, groups, t, b, c, h, w, k)
            reason = TABLE[form.backend].recurrence.unsupported_reason(problem)
        if reason is None:
            can.append(form)
        else:
            bench.skip(f"{case}, {form.name} {name_of(form.dtype)}", reason)
    return can


def limits_of(shape: Shape, passes: str, dtypes: Iterable[torch.dtype], device: str) -> list[Contender]:
    """Return the limits of a shape: a bare convolution of h over all frames, a bare GEMM, a copy.

    On the CPU at the layer's sizes: the product that a step's convolution of h is, a copy of its bytes. On a GPU, which
    so little work does not fill, at sizes that do.
    """
    limits, n, c = list[Contender](), shape.batch * shape.steps, shape.channels
    sizes = ((n, c, shape.height, shape.width), (4 * c, c, shape.kernel, shape.kernel))
    rows, inner, columns = shape.batch * shape.height * shape.width, shape.kernel**2 * c, 4 * c
    work = {"gflop_s": 2.0 * shape.steps * rows * inner * columns}
    if device == "cuda":
        rows = inner = columns = GPU_GEMM
    product = {"gflop_s": 2.0 * rows * inner * columns}
    for dtype in dtypes:
        tensors = [torch.randn(size).to(device, dtype).contiguous(memory_format=torch.channels_last) for size in sizes]
        matrices = [torch.randn(size).to(device, dtype) for size in ((rows, inner), (inner, columns))]
        num_bytes = max(shape.work(passes, dtype)["gb_s"], GPU_COPY_BYTES if device == "cuda" else 0)
        limits += [
            Contender("convolution", partial(conv2d, *tensors, padding="same"), name_of(dtype), work, limit=True),
            Contender("GEMM", partial(torch.matmul, *matrices), name_of(dtype), product, limit=True),
            copy_limit(num_bytes, name_of(dtype), device),
        ]
    return limits


def layer_rows(
    bench: Bench, shape: Shape, forms: Sequence[Form], rounds: int, passes: Iterable[str] = PASSES, device: str = "cpu"
) -> list[Row]:
    """Check and time all forms of a shape.

    A peer that raises, like a compiler that is not installed, is recorded as missing. An error of ours is a bug.
    """
    torch._dynamo.reset()
    data, case, layers = solved(shape, device), f"layer {shape}", list[tuple[Layer, dict[str, float]]]()
    for form in runnable(bench, case, forms, shape, device):
        try:
            layer = Layer(form, data, device)
            layers.append((layer, layer.check()))
        except Exception as error:
            if form.backend:
                raise
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            bench.skip(f"{case}, {form.name} {name_of(form.dtype)}", reason)
    rows = list[Row]()
    for which in passes:
        contenders = []
        for layer, difference in layers:
            form = layer.form
            if which == "forward+backward" or not form.training_only:
                dtype, work = name_of(form.dtype), shape.work(which, form.dtype)
                timed = Contender(form.name, layer.calls[which], dtype, work, ours=bool(form.backend), group=form.group)
                contenders.append(checked(timed, difference, form.dtype))
        contenders += limits_of(shape, which, dict.fromkeys(layer.form.dtype for layer, _ in layers), device)
        rows += compare(case, which, contenders, rounds, CLOCKS[device])
    return rows
