"""The ConvLSTM's textbook form in float64, the limits that follow from it, and the cases of the kernel tests.

Tensors come in the order of `NAMES`; a missing state is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels import convlstm_cells
from rlv2v.kernels.layout import state_dtype

NAMES = ("x", "w_x", "w_h", "bias", "h0", "c0")
LOSSES = ("hs and cs", "hs", "c_T")
STATES = {"state": ("h0", "c0"), "zero": (), "h0 alone": ("h0",), "c0 alone": ("c0",)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BACKEND_DTYPES = {"reference": DTYPES, "eager": DTYPES, "cpu": DTYPES[1:], "triton": DTYPES[1:]}
"""A new backend gets its entry here, and the tests run it."""
Tensors = list[Tensor | None]


class Run(NamedTuple):
    """A way to call `convlstm_cells`."""

    backend: str
    dtype: torch.dtype
    recompute: bool = False

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}{'-recompute' * self.recompute}"

    @property
    def options(self) -> dict[str, Any]:
        return {"backend": self.backend, "recompute": self.recompute}


ALL_RUNS = [
    Run(backend, dtype, recompute)
    for backend, dtypes in BACKEND_DTYPES.items()
    for dtype in dtypes
    for recompute in (False, True)
    if not (backend == "reference" and recompute)
]
RUNS = [run for run in ALL_RUNS if run.backend != "triton"]  # Triton's interpreter takes seconds where these take 20 ms


def fast(values: Sequence[Any], *indices: int) -> list[Any]:
    """Return parameters of which those with these indices run in every test run, and the others in the thorough one."""
    slow = pytest.mark.thorough
    return [value if n in indices else pytest.param(value, marks=slow) for n, value in enumerate(values)]


class Shape(NamedTuple):
    """The sizes B, T, C_in, C, H, W, k, G of a sequence; G = 0 means no axis of groups."""

    batch: int
    steps: int
    inputs: int
    channels: int
    height: int
    width: int
    kernel: int
    groups: int = 0

    def __str__(self) -> str:
        return "x".join(map(str, self))

    def of(self, name: str) -> tuple[int, ...]:
        """Return the shape of an argument."""
        batch, steps, inputs, channels, height, width, kernel, _ = self
        one = {
            "x": (batch, steps, inputs, height, width),
            "w_x": (4 * channels, inputs, kernel, kernel),
            "w_h": (4 * channels, channels, kernel, kernel),
            "bias": (4 * channels,),
        }.get(name, (batch, channels, height, width))
        return (self.groups, *one) if self.groups else one

    def scale(self, name: str) -> float:
        """Return the factor that gives pre-activations of unit size."""
        fan_in = {"w_x": self.inputs, "w_h": self.channels}.get(name)
        return 1.0 if fan_in is None else (fan_in * self.kernel**2) ** -0.5

    @property
    def value_terms(self) -> int:
        """The terms of the longest sum behind a state: a pre-activation."""
        return self.kernel**2 * (self.inputs + self.channels) + 1

    @property
    def gradient_terms(self) -> int:
        """The terms of the longest sum behind a gradient: w_h^T * da, or a weight's over all pixels."""
        return max(self.kernel**2 * 4 * self.channels, self.steps * self.batch * self.height * self.width)


# Such that no gradient of few numbers comes out near zero by chance, where a ratio of norms says nothing.
SHAPES = [
    Shape(2, 4, 3, 5, 7, 6, 3),
    Shape(1, 3, 4, 2, 6, 9, 1),
    Shape(2, 3, 1, 3, 11, 4, 5),
    Shape(3, 1, 2, 2, 4, 4, 3),
    Shape(3, 5, 3, 4, 1, 1, 3),
    Shape(2, 2, 2, 1, 5, 4, 3),
    Shape(1, 2, 5, 17, 6, 5, 3),
    Shape(3, 3, 2, 33, 2, 3, 1),
    Shape(1, 1, 1, 16, 1, 8, 5),
    Shape(2, 3, 3, 5, 4, 6, 3, groups=3),
]


def literal(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return hs and cs of Shi et al. 2015, eq. 3, as `convlstm_cells`: a group and a step at a time."""
    if x.dim() == 6:
        groups = zip(*([None] * len(x) if a is None else a for a in (x, w_x, w_h, bias, h, c)), strict=True)
        hs, cs = zip(*(literal(*group) for group in groups), strict=True)
        return torch.stack(hs), torch.stack(cs)
    padding, zeros = w_h.shape[-1] // 2, x.new_zeros(x.shape[0], w_h.shape[1], *x.shape[-2:])
    h, c = zeros if h is None else h, zeros if c is None else c
    states = []
    for x_t in x.unbind(1):
        i, f, o, g = (conv2d(x_t, w_x, bias, padding=padding) + conv2d(h, w_h, padding=padding)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append((h, c))
    hs, cs = zip(*states, strict=True)
    return torch.stack(hs, 1), torch.stack(cs, 1)


def arguments(shape: Shape, dtype: torch.dtype, state: str = "state") -> Tensors:
    """Return leaves of a dtype that want gradients, c0 too."""
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(shape.of(name), generator=rng, dtype=torch.float64) * shape.scale(name) for name in NAMES]
    missing = {"h0", "c0"} - set(STATES[state])
    return [None if name in missing else a.to(dtype).requires_grad_() for name, a in zip(NAMES, values, strict=True)]


def exact_copies(tensors: Sequence[Tensor | None]) -> Tensors:
    """Return the same numbers in float64, as new leaves that want gradients."""
    return [None if a is None else a.detach().double().clone().requires_grad_() for a in tensors]


def present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are not None."""
    return [a for a in tensors if a is not None]


def loss_weights(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return dhs and dcs of a loss that weighs every state, in the dtypes of hs and cs for inputs of `dtype`."""
    rng = torch.Generator().manual_seed(1)
    dhs, dcs = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    return dhs.to(dtype), dcs.to(state_dtype(dtype))


def gradients(
    loss: str, hs: Tensor, cs: Tensor, inputs: Sequence[Tensor | None], dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Return by name the gradients, of those inputs that want one, of a loss of `LOSSES` with weights in `dtype`."""
    dhs, dcs = (weight.to(a) for weight, a in zip(loss_weights(hs.shape, dtype), (hs, cs), strict=True))
    time_axis = cs.dim() - 4
    outputs, weights = {
        "hs and cs": ([hs, cs], [dhs, dcs]),
        "hs": ([hs], [dhs]),
        "c_T": ([cs.select(time_axis, -1)], [dcs.select(time_axis, -1)]),
    }[loss]
    wanted = {name: a for name, a in zip(NAMES, inputs, strict=True) if a is not None and a.requires_grad}
    # hs and cs are used more than once: a backward that overwrites what was saved would show.
    result = torch.autograd.grad(outputs, list(wanted.values()), weights, retain_graph=True, allow_unused=True)
    return dict(zip(wanted, result, strict=True))


@cache
def answer(
    shape: Shape, dtype: torch.dtype, state: str = "state"
) -> tuple[Tensor, Tensor, dict[str, dict[str, Tensor | None]]]:
    """Return the right hs, cs and gradients by loss and name for `arguments(...)`, in float64."""
    inputs = exact_copies(arguments(shape, dtype, state))
    hs, cs = literal(*inputs)
    return hs.detach(), cs.detach(), {loss: gradients(loss, hs, cs, inputs, dtype) for loss in LOSSES}


def sum_eps(dtype: torch.dtype) -> float:
    """Return eps of the dtype in which a sum of numbers of `dtype` is added up."""
    return torch.finfo(state_dtype(dtype)).eps


def value_limit(dtype: torch.dtype, terms: int) -> float:
    """Return by how much a state of unit size may be off if its pre-activations are sums of so many terms.

    Each addition rounds a partial sum of at most unit size by up to eps/2. In whatever order a library adds, these
    errors walk randomly to eps/2 * sqrt(terms); the largest of 1e5 numbers is four to five times as far off: 2 eps
    sqrt(terms) (measured with our AVX2 and AVX-512 gates: 1.3). A pre-activation is stored twice and h once, each
    rounded by eps/2 of a number up to 4: 2 eps of the storage dtype (measured: 1.5), which is what counts in 16 bits.
    """
    return 2 * torch.finfo(dtype).eps + 2 * sum_eps(dtype) * terms**0.5


def gradient_limit(dtype: torch.dtype, terms: int) -> float:
    """Return the error of a gradient as a ratio of norms if its longest sum has so many terms.

    As for values, but a norm sees the mean error, not the largest: eps sqrt(terms) (measured: 0.6). a, h, gates, da and
    the gradient itself are stored, five roundings of eps/2 (measured together: 1.5 eps).
    """
    return 2.5 * torch.finfo(dtype).eps + sum_eps(dtype) * terms**0.5


def assert_values(hs: Tensor, cs: Tensor, right: Sequence[Tensor], dtype: torch.dtype, terms: int) -> None:
    """Assert the limit of a dtype: on h absolutely, on c too but in proportion where it is above 1."""
    assert hs.dtype == dtype
    assert cs.dtype == state_dtype(dtype)
    for name, ours, exact in zip(("hs", "cs"), (hs, cs), right, strict=True):
        assert ours.shape == exact.shape, name
        off = ((ours.double().cpu() - exact).abs() / exact.abs().clamp(min=1)).flatten().detach()
        assert off.numel() == 0 or off.max() <= value_limit(dtype, terms), f"{name} is off by {off.max():.1e}"


def assert_gradients(
    ours: dict[str, Tensor | None], exact: dict[str, Tensor | None], dtype: torch.dtype, terms: int
) -> None:
    """Assert the limit of a dtype on the norm of each error, as a ratio to that of the exact gradient."""
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        got = ours[name]
        want = torch.zeros(()) if want is None else want
        got = torch.zeros(want.shape) if got is None else got
        assert got.shape == want.shape or not want.dim(), name
        off, size = (got.double().cpu() - want).norm(), want.norm()
        limit = gradient_limit(dtype, terms)
        assert off <= limit * size, f"d{name} is off by {off / size:.1e}, exact norm {size:.1e}"


def check_call(shape: Shape, state: str, run: Run, losses: Sequence[str] = LOSSES, device: Any = "cpu") -> None:
    """Assert the values of one call of `convlstm_cells` and the gradients of each loss."""
    inputs, (*states, right) = arguments(shape, run.dtype, state), answer(shape, run.dtype, state)
    inputs = [None if a is None else a.detach().to(device).requires_grad_() for a in inputs]
    hs, cs = convlstm_cells(*inputs, **run.options)
    assert_values(hs, cs, states, run.dtype, shape.value_terms)
    for loss in losses:
        ours = gradients(loss, hs, cs, inputs, run.dtype)
        assert all(gradient is None or gradient.dtype == run.dtype for gradient in ours.values()), loss
        assert_gradients(ours, right[loss], run.dtype, shape.gradient_terms)
