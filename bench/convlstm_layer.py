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
Pair = tuple[Tensor, Tensor]
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


Tensors = tuple[Tensor, ...]
Data = tuple[Tensors, Tensors]
"""x, the gradient of hs, w_x, w_h, bias; and what the float64 reference makes of them: hs amid its gradients."""


def rounded(tensor: Tensor) -> Tensor:
    """Return float64 values that bfloat16 and float16 hold, so that all contenders get the same numbers."""
    return tensor.bfloat16().half().double()


def solved(shape: Shape, device: str = "cpu", seed: int = 0) -> Data:
    """Return unit-sized random data, with weights that keep the pre-activations unit-sized, and the exact result."""
    rng = torch.Generator().manual_seed(seed)
    b, t, c_in, c, h, w, k = shape
    scale = ((c_in + c) * k * k) ** -0.5
    sizes = ((b, t, c_in, h, w), (b, t, c, h, w), (4 * c, c_in, k, k), (4 * c, c, k, k), (4 * c,))
    scales = (1.0, 1.0, scale, scale, 1.0)
    tensors = [rounded(torch.randn(size, generator=rng) * s) for size, s in zip(sizes, scales, strict=True)]
    x, dhs, w_x, w_h, bias = (tensor.to(device, copy=True).requires_grad_() for tensor in tensors)
    hs, _ = convlstm_ref(x, w_x, w_h, bias, None, None)
    dx, *dw = torch.autograd.grad(hs, (x, w_x, w_h, bias), dhs)
    return tuple(tensors), (dx, hs.detach(), *dw)


def stacked(data: list[Data]) -> Data:
    """Return several layers of one shape as one with a leading group axis."""
    inputs, exact = (tuple(map(torch.stack, zip(*part, strict=True))) for part in zip(*data, strict=True))
    return inputs, exact


def frame_major(frames: Tensor) -> Tensor:
    """Return (...,B,T,C,H,W) dense in the order T,B,H,W,C, as our layers hand it on; itself if it is so."""
    return frames.transpose(-5, -4).movedim(-3, -1).contiguous().movedim(-1, -3).transpose(-5, -4)


def joined(x: Tensor, hs: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor) -> Tensors:
    """Join the weights of x and h, for a convolution of both at once."""
    return x, hs, torch.cat((w_x, w_h), 1), bias


def weights_last(x: Tensor, hs: Tensor, *weights: Tensor) -> Tensors:
    """Lay the weights channels-last."""
    *kernels, bias = weights
    return x, hs, *(w.movedim(-3, -1).contiguous().movedim(-1, -3) for w in kernels), bias


def all_last(x: Tensor, hs: Tensor, *weights: Tensor) -> Tensors:
    """Lay weights channels-last and frames dense in the order T,B,H,W,C."""
    return weights_last(frame_major(x), frame_major(hs), *weights)


def cell_order(x: Tensor, hs: Tensor, *weights: Tensor) -> Tensors:
    """Put gates i, f, o, g in aten's order i, f, g, o, in the same memory format."""
    return x, hs, *(torch.empty_like(w).copy_(w.unflatten(0, (4, -1))[[0, 1, 3, 2]].flatten(0, 1)) for w in weights)


@dataclass(frozen=True)
class Form:
    """Describe one way to run the layer."""

    name: str
    dtype: torch.dtype
    run: Run  # x and the weights, as they are laid, to hs
    lay: tuple[Callable[..., Tensors], ...] = ()  # what lays x, hs, w_x, w_h, bias, and their gradients alike
    leaves: torch.dtype | None = None  # dtype of x and the weights where it is not `dtype`: autocast
    backend: str = ""  # of rlv2v.kernels; empty for a peer
    group: str = ""
    training_only: bool = False  # differs from another form in the backward alone
    separate: bool = False  # of several networks, a call each
    graphs: bool = False  # runs in CUDA graphs, whose results the next call overwrites

    def unsupported_reason(self, shape: Shape, device: str, networks: int) -> str | None:
        """Return why our backend cannot run a shape, or None."""
        if not self.backend:
            return None
        b, t, _, c, h, w, k = shape
        problem = Problem(torch.device(device), self.dtype, 1 if self.separate else networks, t, b, c, h, w, k)
        return TABLE[self.backend].recurrence.unsupported_reason(problem)


class Layer:
    """Run a form on its own copy of the arguments, of one network or of several, one call each."""

    def __init__(self, form: Form, data: Sequence[Data], device: str = "cpu") -> None:
        self.form, self.networks = form, list[tuple[list[Tensor], Tensor, Tensors]]()
        for inputs, exact in data:
            for lay in form.lay:
                inputs, exact = lay(*inputs), lay(*exact)
            (x, dhs, *weights), (dx, hs, *dw) = inputs, exact
            dtype = form.leaves or form.dtype  # `to` keeps the strides
            leaves = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in (x, *weights)]
            self.networks.append((leaves, dhs.to(device, form.dtype), (hs, dx, *dw)))
        self.calls: dict[str, Callable[[], object]] = {"forward": self.forward, "forward+backward": self.train}

    def run(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return hs of a network."""
        if self.form.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self.form.run(*leaves)

    def forward(self) -> list[Tensor]:
        """Return hs of all without keeping anything for a backward, as in translation."""
        with torch.no_grad():
            return [self.run(leaves) for leaves, _, _ in self.networks]

    def train(self) -> list[Tensors]:
        """Return hs and the gradients of x and all weights, of all."""
        results = []
        for leaves, dhs, _ in self.networks:
            hs = self.run(leaves)
            results.append((hs, *torch.autograd.grad(hs, leaves, dhs)))
        return results

    def check(self) -> dict[str, float]:
        """Return the differences of both passes from the exact result."""
        values, gradients, alone = list[Pair](), list[Pair](), [hs.clone() for hs in self.forward()]
        for forward, result, (_, _, exact) in zip(alone, self.train(), self.networks, strict=True):
            values += [(forward, exact[0]), (result[0], exact[0])]
            gradients += zip(result[1:], exact[1:], strict=True)
        return differences(values, gradients)


def differences(values: Iterable[Pair], gradients: Iterable[Pair]) -> dict[str, float]:
    """Return the largest absolute difference of values from the exact ones, and ratio of norms of gradients."""
    value = torch.stack([(actual.double() - exact).abs().max() for actual, exact in values]).max()
    gradient = torch.stack([(actual.double() - exact).norm() / exact.norm() for actual, exact in gradients]).max()
    return {"value": value.item(), "gradient": gradient.item()}


def checked(contender: Contender, difference: dict[str, float], dtype: torch.dtype) -> Contender:
    """Return the contender, valid if its differences are within the kernels' limits, twice those for a peer."""
    slack, limit = (1 if contender.ours else PEER_SLACK), LIMITS[dtype]
    valid = difference["value"] <= slack * limit.value and difference["gradient"] <= slack * limit.gradient
    return replace(contender, valid=valid, fields={"difference": difference})


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


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
    bench: Bench,
    shape: Shape,
    forms: Sequence[Form],
    rounds: int,
    passes: Iterable[str] = PASSES,
    device: str = "cpu",
    networks: int = 1,
) -> list[Row]:
    """Check and time all forms of a shape: of one layer, or of several networks in one call or in a call each.

    A peer that raises, like a compiler that is not installed, is recorded as missing. An error of ours is a bug.
    """
    torch._dynamo.reset()
    case = f"layer {shape}" if networks == 1 else f"{networks} networks {shape}"
    data = [solved(shape, device, seed) for seed in range(networks)]
    whole = shape._replace(batch=networks * shape.batch)
    layers = list[tuple[Layer, dict[str, float]]]()
    for form in forms:
        name, own = f"{case}, {form.name} {name_of(form.dtype)}", data
        if reason := form.unsupported_reason(shape, device, networks):
            bench.skip(name, reason)
            continue
        if networks > 1 and not form.separate:
            own = [stacked(data)]
        try:
            layer = Layer(form, own, device)
            layers.append((layer, layer.check()))
        except Exception as error:
            if form.backend:
                raise
            bench.skip(name, error)
    rows = list[Row]()
    for which in passes:
        contenders = []
        for layer, difference in layers:
            form = layer.form
            if which == "forward+backward" or not form.training_only:
                dtype, work = name_of(form.dtype), whole.work(which, form.dtype)
                timed = Contender(form.name, layer.calls[which], dtype, work, ours=bool(form.backend), group=form.group)
                contenders.append(checked(timed, difference, form.dtype))
        contenders += limits_of(whole, which, dict.fromkeys(layer.form.dtype for layer, _ in layers), device)
        rows += compare(case, which, contenders, rounds, CLOCKS[device])
    return rows
