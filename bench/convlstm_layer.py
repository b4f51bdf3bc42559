"""A ConvLSTM layer to be timed: its data, its exact result, a way to run it, and the rows of all ways at one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from convlstm_rows import (
    Case,
    Contender,
    Row,
    StepTimer,
    case_rows,
    copy,
    cuda_us,
    differences,
    frame_major,
    name_of,
    rounded,
    wall_us,
)
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels.dispatch import RUNNERS, Problem
from rlv2v.kernels.frames import gates_dtype, state_dtype
from rlv2v.kernels.reference import convlstm_ref

Run = Callable[..., Tensor]
PASSES = ("forward", "forward+backward")
FILLING, FILLING_BYTES = 4096, 2**29  # rows and columns of a GEMM, bytes of a copy, that a GPU takes at its full rate


class Shape(NamedTuple):
    """A layer's sizes."""

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
        """Of all hidden states."""
        return self.batch * self.steps * self.channels * self.height * self.width

    def work(self, passes: str, dtype: torch.dtype) -> dict[str, float]:
        """What has to be done: FLOPs of the convolutions, bytes that have to be moved.

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


@dataclass(frozen=True)
class Data:
    """Arguments of a layer without a state and the gradient of its result, in float64 but `rounded`."""

    x: Tensor
    w_x: Tensor
    w_h: Tensor
    bias: Tensor
    dhs: Tensor
    exact: tuple[Tensor, ...] = ()
    """hs, and the gradients of x, w_x, w_h, bias; empty when nothing is to be checked."""


def noise(shape: Shape, seed: int = 0) -> Data:
    """Unit-sized, with weights that keep pre-activations so; nothing exact."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return rounded(torch.randn(*size, generator=rng) * scale)

    b, t, c_in, c, h, w, k = shape
    scale = ((c_in + c) * k * k) ** -0.5
    w_x, w_h = normal(4 * c, c_in, k, k, scale=scale), normal(4 * c, c, k, k, scale=scale)
    return Data(normal(b, t, c_in, h, w), w_x, w_h, normal(4 * c), normal(b, t, c, h, w))


def solved(data: Data, device: str = "cpu") -> Data:
    """With what is exact: the reference in float64, run on a device."""
    given = (data.x, data.w_x, data.w_h, data.bias)
    leaves = x, w_x, w_h, bias = [tensor.to(device, copy=True).requires_grad_() for tensor in given]
    hs, _ = convlstm_ref(x, w_x, w_h, bias, None, None)
    return replace(data, exact=(hs.detach(), *torch.autograd.grad(hs, leaves, data.dhs.to(device))))


def stacked(data: list[Data]) -> Data:
    """Several layers of one shape as one with an axis before all."""
    names = ("x", "w_x", "w_h", "bias", "dhs")
    tensors = {name: torch.stack([getattr(one, name) for one in data]) for name in names}
    return Data(**tensors, exact=tuple(torch.stack(part) for part in zip(*(one.exact for one in data), strict=True)))


@dataclass(frozen=True)
class Form:
    """A way to run the layer."""

    name: str
    dtype: torch.dtype
    run: Run
    """x, then w_x and w_h or, `joined`, one weight of both, then the bias, to hs."""
    joined: bool = False
    leaves: torch.dtype | None = None
    """Of x and the weights, where it is not `dtype`: autocast."""
    channels_last: bool = False
    frame_major: bool = False
    cell_order: bool = False
    """Gates i, f, g, o in the weights, as in aten's LSTM cell."""
    backend: str = ""
    """Of rlv2v.kernels; empty for a peer."""
    group: str = ""
    training_only: bool = False
    """Differs from another form in the backward alone."""
    graphs: bool = False
    """Runs in CUDA graphs, whose results the next call overwrites."""

    @property
    def label(self) -> str:
        """Unlike those of the other forms of a case: ours come in several dtypes."""
        return f"{self.name} {name_of(self.dtype)}" if self.backend else self.name


class Layer:
    """A form with its own copy of the arguments."""

    def __init__(self, form: Form, data: Data, device: str = "cpu") -> None:
        self.form, self.exact = form, data.exact
        weights = [torch.cat((data.w_x, data.w_h), 1)] if form.joined else [data.w_x, data.w_h]
        if form.channels_last or form.frame_major:
            weights = [weight.movedim(-3, -1).contiguous().movedim(-1, -3) for weight in weights]
        weights = [reordered(weight) if form.cell_order else weight for weight in (*weights, data.bias)]
        x, dhs = (frame_major(tensor) if form.frame_major else tensor for tensor in (data.x, data.dhs))
        dtype = form.leaves or form.dtype  # `to` keeps the strides
        self.leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in (x, *weights)]
        self.dhs = dhs.to(device, form.dtype)

    def run(self) -> Tensor:
        """hs."""
        if self.form.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.form.run(*self.leaves)

    def forward(self) -> Tensor:
        """hs, nothing kept for a backward, as in translation."""
        with torch.no_grad():
            return self.run()

    def train(self) -> tuple[Tensor, ...]:
        """hs and the gradients of x and all weights."""
        hs = self.run()
        return hs, *torch.autograd.grad(hs, self.leaves, self.dhs)

    def outcome(self) -> tuple[Tensor, ...]:
        """hs of both passes and the gradients of x, w_x, w_h, bias, as in `Data.exact`."""
        alone = self.forward().clone()
        hs, dx, *dw = self.train()
        if self.form.cell_order:
            dw = [reordered(gradient) for gradient in dw]
        if self.form.joined:
            c_in = self.leaves[0].shape[2]
            dw = [dw[0][:, :c_in], dw[0][:, c_in:], dw[1]]
        return alone, hs, dx, *dw

    def check(self) -> dict[str, float]:
        """Differences from what is exact."""
        return differences(self.outcome(), (self.exact[0], *self.exact), num_values=2)

    def call(self, passes: str) -> Callable[[], object]:
        """What is timed."""
        return self.forward if passes == "forward" else self.train

    def contender(self, shape: Shape, passes: str) -> Contender:
        """For the rows of a pass."""
        form, call, work = self.form, self.call(passes), shape.work(passes, self.form.dtype)
        ours = bool(form.backend)
        return Contender(form.label, form.dtype, call, work, ours=ours, backend=form.name, group=form.group)


def reordered(weight: Tensor) -> Tensor:
    """(4C,...) with the last two gates swapped, i, f, o, g to i, f, g, o and back, in the memory format that it has."""
    i, f, o, g = weight.chunk(4)
    return torch.empty_like(weight).copy_(torch.cat((i, f, g, o)))


def obstacle(form: Form, shape: Shape, device: str, groups: int = 1) -> str | None:
    """Why a backend of ours cannot run a shape; None for one that can, and for a peer."""
    if not form.backend:
        return None
    b, t, _, c, h, w, k = shape
    problem = Problem(torch.device(device), form.dtype, groups, t, b, c, h, w, k)
    return RUNNERS[form.backend].obstacle(problem)


def bare_convolution(shape: Shape, dtype: torch.dtype, device: str) -> Contender:
    """The layer's convolution of h, alone, over all B*T frames, channels-last: a limit."""
    n, c = shape.batch * shape.steps, shape.channels
    sizes = ((n, c, shape.height, shape.width), (4 * c, c, shape.kernel, shape.kernel))
    frames, weight = (
        torch.randn(size).to(device, dtype).contiguous(memory_format=torch.channels_last) for size in sizes
    )
    work = {"gflop_s": 2.0 * n * shape.height * shape.width * 4 * c * c * shape.kernel**2}

    def call() -> Tensor:
        return conv2d(frames, weight, padding=shape.kernel // 2)

    return Contender(f"convolution {name_of(dtype)}", dtype, call, work, limit=True, backend="convolution")


def bare_gemm(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> Contender:
    """(rows,inner) by (inner,columns), alone: a limit."""
    left, right = (torch.randn(size).to(device, dtype) for size in ((rows, inner), (inner, columns)))
    work = {"gflop_s": 2.0 * rows * inner * columns}
    return Contender(f"GEMM {name_of(dtype)}", dtype, lambda: left @ right, work, limit=True, backend="GEMM")


def limits_of(shape: Shape, passes: str, dtypes: Iterable[torch.dtype], device: str) -> list[Contender]:
    """What is measured beside the forms of a shape: a layer has at least these convolutions to do and bytes to move.

    On the CPU at the layer's sizes: the product that a step's convolution of h is, a copy of its bytes. On a GPU, which
    so little work does not fill, at sizes that do.
    """
    limits = []
    for dtype in dtypes:
        sizes = (shape.batch * shape.height * shape.width, shape.kernel**2 * shape.channels, 4 * shape.channels)
        num_bytes = shape.work(passes, dtype)["gb_s"]
        if device == "cuda":
            sizes, num_bytes = (FILLING,) * 3, max(num_bytes, FILLING_BYTES)
        limits += [bare_convolution(shape, dtype, device), bare_gemm(*sizes, dtype, device)]
        limits.append(copy(num_bytes, dtype, device))
    return limits


def layer_rows(
    shape: Shape, forms: list[Form], rounds: int, passes: Iterable[str] = PASSES, device: str = "cpu"
) -> tuple[list[Row], dict[str, str]]:
    """Rows of all forms of a shape, checked, timed, printed; and why forms are not among them.

    What ours get wrong is a row; what a peer raises, a compiler that is not there, is a reason.
    """
    torch._dynamo.reset()
    data, name = solved(noise(shape), device), f"layer {shape}"
    layers: list[Layer] = []
    found: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    for form in forms:
        why = obstacle(form, shape, device)
        if why is None:
            layer = Layer(form, data, device)
            try:
                found[form.label] = layer.check()
            except Exception as error:
                if form.backend:
                    raise
                why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            else:
                layers.append(layer)
        if why is not None:
            missing[f"{name}, {form.label}"] = why
            print(f"{name} | {form.label:30} | not measured: {why}", flush=True)
    clock: StepTimer = cuda_us if device == "cuda" else wall_us
    rows: list[Row] = []
    dtypes = dict.fromkeys(layer.form.dtype for layer in layers)
    for one in passes:
        taking_part = [layer for layer in layers if one == "forward+backward" or not layer.form.training_only]
        contenders = [layer.contender(shape, one) for layer in taking_part]
        contenders += limits_of(shape, one, dtypes, device)
        rows += case_rows(Case(name, one, contenders, found), rounds, clock)
    return rows, missing
