"""The bilateral grid: every backend that runs on the CPU against `grid_sample` in float64, both ways, at odd shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from convlstm_cases import fast
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import grid_sample, interpolate

from rlv2v import _native
from rlv2v.data import to_model, to_uint8
from rlv2v.kernels.bilateral import slice_apply, slice_apply_frame
from rlv2v.kernels.triton.recurrence import unavailable_reason

pytestmark = pytest.mark.usefixtures("one_thread")

TRITON = unavailable_reason(torch.device("cpu")) is None
BACKENDS = ["cpu", *(["triton"] if TRITON else [])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("grid", "guide", "frames")


class Shape(NamedTuple):
    batch: int
    bins: int
    grid_height: int
    grid_width: int
    height: int
    width: int


SHAPES = [Shape(2, 6, 3, 4, 13, 37), Shape(1, 1, 1, 1, 5, 3), Shape(3, 8, 2, 5, 1, 1), Shape(1, 2, 7, 9, 4, 6)]
INTERPRETED = [
    Shape(2, 3, 2, 3, 9, 31),
    Shape(1, 1, 1, 1, 5, 3),
    Shape(1, 2, 3, 2, 2, 1),
]  # a launch takes milliseconds
CASES = [("cpu", shape, dtype) for shape in SHAPES for dtype in DTYPES]
CASES += [("triton", shape, dtype) for shape in INTERPRETED for dtype in DTYPES if TRITON]
FAST = [*range(12), 12, 16]


def arguments(shape: Shape, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Leaves that want gradients; guides lie beyond both ends too, and not within 1e-3 of a kink, where slopes jump."""
    rng = torch.Generator().manual_seed(seed)
    batch, bins, *cells, height, width = shape
    grid = torch.rand(batch, 12, bins, *cells, generator=rng, dtype=torch.float64) * 2 - 1
    guide = torch.rand(batch, height, width, generator=rng, dtype=torch.float64) * 1.6 - 0.3
    place = (guide * bins - 0.5).round() - (guide * bins - 0.5)
    near = place.abs() < 0.02 * bins
    guide = torch.where(near, guide + 0.04, guide)
    frames = torch.rand(batch, 3, height, width, generator=rng, dtype=torch.float64) * 2 - 1
    return [a.to(dtype).requires_grad_() for a in (grid, guide, frames)]


def literal(grid: Tensor, guide: Tensor, frames: Tensor) -> Tensor:
    """A frame, an output and an input channel at a time, by PyTorch's sampling of one coefficient."""
    height, width = frames.shape[2:]
    y = ((torch.arange(height, dtype=torch.float64) + 0.5) / height * 2 - 1)[:, None].expand(height, width)
    x = ((torch.arange(width, dtype=torch.float64) + 0.5) / width * 2 - 1)[None].expand(height, width)
    outs = []
    for cells, at, frame in zip(grid, guide, frames, strict=True):
        places = torch.stack((x, y, at * 2 - 1), -1)[None, None]
        a = [
            grid_sample(table[None, None], places, padding_mode="border", align_corners=False)[0, 0, 0]
            for table in cells
        ]
        outs.append(
            torch.stack([a[c] * frame[0] + a[c + 1] * frame[1] + a[c + 2] * frame[2] + a[c + 3] for c in (0, 4, 8)])
        )
    return torch.stack(outs)


def answer(inputs: list[Tensor], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    exact = [a.detach().double().requires_grad_() for a in inputs]
    out = literal(*exact)
    return out.detach(), dict(zip(NAMES, torch.autograd.grad(out, exact, weights.double()), strict=True))


def check(inputs: list[Tensor], backend: str) -> None:
    dtype = inputs[2].dtype
    weights = torch.randn(inputs[2].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    out = slice_apply(*inputs, backend=backend)
    ours = dict(zip(NAMES, torch.autograd.grad(out, inputs, weights), strict=True))
    exact, right = answer(inputs, weights)
    assert out.dtype == dtype and out.shape == exact.shape
    # Sums of 32 products in float32 of numbers of unit size; places are float32 too, slopes bins times as large.
    eps, stored = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    bins = inputs[0].shape[2]
    limit = 16 * bins * eps + stored * exact.abs().clamp(min=1)
    assert ((out.double() - exact).abs() <= limit).all()
    for name, want in right.items():
        got = ours[name]
        assert got.dtype == dtype and got.shape == want.shape, name
        size = torch.maximum(want.norm(), weights.double().norm())  # of the products, whose sum may be next to nothing
        assert (got.double() - want).norm() <= (16 * bins * eps + stored) * size, name


@pytest.mark.parametrize("case", fast(CASES, *FAST), ids=str)
def test_values_and_gradients_are_those_of_grid_sample(case: tuple[str, Shape, torch.dtype]) -> None:
    backend, shape, dtype = case
    check(arguments(shape, dtype), backend)


def test_the_reference_in_float64_is_the_definition() -> None:
    for shape in SHAPES:
        inputs = arguments(shape, torch.float64)
        weights = torch.randn(inputs[2].shape, dtype=torch.float64)
        out = slice_apply(*inputs)  # "auto": no other takes float64
        exact, right = answer(inputs, weights)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
        for got, want in zip(torch.autograd.grad(out, inputs, weights), right.values(), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert torch.autograd.gradgradcheck(
        lambda *a: slice_apply(*a, backend="reference"), arguments(Shape(1, 2, 2, 1, 2, 3), torch.float64)
    )


def test_every_instruction_set_gives_the_same(isa: str) -> None:
    assert _native.isa() == isa
    for shape in SHAPES:
        check(arguments(shape, torch.float32), "cpu")


@given(
    shape=st.builds(
        Shape, st.integers(1, 2), st.integers(1, 8), *(st.integers(1, 5) for _ in range(2)), *(st.integers(1, 40),) * 2
    ),
    seed=st.integers(0, 99),
)
@example(shape=Shape(1, 2, 2, 1, 2, 1), seed=48)  # the products of the guide's gradient cancel out
@settings(max_examples=40, deadline=None)
def test_any_shape(shape: Shape, seed: int) -> None:
    check(arguments(shape, torch.float32, seed), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_needs_are_not_made(backend: str) -> None:
    inputs = arguments(INTERPRETED[2], torch.float32)
    whole = torch.autograd.grad(slice_apply(*inputs, backend=backend).sum(), inputs)
    for n, want in enumerate(whole):
        some = [a if k == n else a.detach() for k, a in enumerate(inputs)]
        (got,) = torch.autograd.grad(slice_apply(*some, backend=backend).sum(), some[n])
        assert torch.equal(got, want)


def test_strides_do_not_matter_and_an_empty_batch_is_empty() -> None:
    grid, guide, frames = (a.detach() for a in arguments(SHAPES[0], torch.float32))
    want = slice_apply(grid, guide, frames)
    strided = (grid.movedim(1, -1).contiguous().movedim(-1, 1), guide.mT.contiguous().mT)
    assert torch.equal(slice_apply(*strided, frames.contiguous(memory_format=torch.channels_last)), want)
    for backend in BACKENDS:
        empty = [a[:0].requires_grad_() for a in (grid, guide, frames)]
        out = slice_apply(*empty, backend=backend)
        assert out.shape == (0, *frames.shape[1:])
        assert [a.shape for a in torch.autograd.grad(out.sum(), empty)] == [a.shape for a in empty]


def test_torchs_own_checks_and_one_graph_when_compiled() -> None:
    inputs = arguments(SHAPES[0], torch.float32)
    opcheck(torch.ops.rlv2v.slice_apply, (*inputs, "cpu"))
    saved = [a.detach() for a in inputs]
    opcheck(torch.ops.rlv2v.slice_apply_backward, (*saved, torch.randn_like(saved[2]), "cpu", [True, False, True]))
    compiled = torch.compile(slice_apply, fullgraph=True, backend="aot_eager")
    ours, want = compiled(*inputs), slice_apply(*inputs)
    assert torch.equal(ours, want)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (ours, want)), strict=True):
        assert torch.equal(a, b)
    (slope,) = torch.autograd.grad(slice_apply(*inputs).sum(), inputs[2], create_graph=True)
    with pytest.raises(ValueError, match="backend must be 'reference' for a second derivative, got 'cpu'"):
        slope.sum().backward()


@pytest.mark.parametrize("num_around", [0, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_frame_of_bytes_becomes_what_its_floats_become(shape: Shape, num_around: int) -> None:
    rng = torch.Generator().manual_seed(1)
    grid = arguments(shape, torch.float32)[0][0].detach()
    frame = torch.randint(0, 256, (shape.height, shape.width, 3), generator=rng, dtype=torch.uint8)
    curve = torch.randn(4, 5 + num_around, generator=rng) * 0.4
    around = torch.rand(num_around, 3, 5, generator=rng) * 2 - 1
    x = to_model(frame)
    size = x.shape[-2:]
    near = interpolate(around[None], size, mode="bilinear", align_corners=False)[0] if num_around else x[:0]
    p = torch.cat((x, near, torch.ones_like(x[:1])))
    values = torch.einsum("jk,khw->jhw", curve[:, :-1], p)
    guide = values[0] + (curve[1:, -1, None, None] * values[1:].clamp(min=0)).sum(0)
    floats = slice_apply(grid[None], guide[None], x[None], backend="reference")[0]
    ours = slice_apply_frame(frame, grid, curve, around if num_around else None)
    off = (ours.int() - to_uint8(floats).int()).abs()
    assert ours.shape == frame.shape and ours.dtype == torch.uint8
    assert off.max() <= 1 and (off > 0).float().mean() < 0.02  # where the value lies at one half


def test_the_identity_changes_no_byte() -> None:
    frame = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(16, 16, 3).contiguous()
    grid = torch.eye(3, 4).reshape(12, 1, 1, 1).expand(12, 6, 2, 3)
    assert torch.equal(slice_apply_frame(frame, grid, torch.full((1, 5), 0.3)), frame)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"frames": torch.zeros(1, 4, 5, 6)}, r"frames must be \(B,3,H,W\) of one of .*, got torch.float32 \(1, 4, 5, 6\)"),
    ({"frames": torch.zeros(1, 3, 5, 6, dtype=torch.int32)}, "frames must be .*, got torch.int32"),
    ({"frames": torch.zeros(1, 3, 0, 6)}, "frames must be"),
    ({"grid": torch.zeros(1, 12, 9, 2, 2)}, r"grid must be \(1,12,bins,h,w\) with 1 to 8 bins, got \(1, 12, 9, 2, 2\)"),
    ({"grid": torch.zeros(1, 11, 4, 2, 2)}, "grid must be"),
    ({"grid": torch.zeros(2, 12, 4, 2, 2)}, "grid must be"),
    ({"grid": torch.zeros(1, 12, 4, 0, 2)}, "grid must be"),
    ({"guide": torch.zeros(1, 6, 5)}, r"guide must be \(1, 5, 6\), got \(1, 6, 5\)"),
    ({"guide": torch.zeros(1, 5, 6).double()}, "guide must be torch.float32 on cpu like frames, got torch.float64"),
    ({"grid": torch.zeros(1, 12, 4, 2, 2, device="meta")}, "grid must be torch.float32 on cpu like frames, got .*meta"),
    ({"backend": "cuda"}, r"backend must be 'auto' or one of \['reference', 'cpu', 'triton'\], got 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fitting = {"grid": torch.zeros(1, 12, 4, 2, 2), "guide": torch.zeros(1, 5, 6), "frames": torch.zeros(1, 3, 5, 6)}
    with pytest.raises(ValueError, match=f"slice_apply: {message}"):
        slice_apply(**fitting | change)


def test_frames_that_do_not_fit_are_named() -> None:
    frame, grid, curve = torch.zeros(5, 6, 3, dtype=torch.uint8), torch.zeros(12, 4, 2, 2), torch.zeros(1, 5)
    for bad, message in (
        ((frame.float(), grid, curve), r"frame must be torch.uint8 \(H,W,3\) on the CPU, got torch.float32"),
        ((frame, grid[None], curve), r"grid must be torch.float32 \(12,bins,h,w\)"),
        ((frame, grid, curve[:0]), r"curve must be torch.float32 \(1\+J,5\+K\)"),
        ((frame, grid, curve, torch.zeros(2, 2)), r"around must be torch.float32 \(K,h',w'\)"),
        ((frame, grid, curve, torch.zeros(2, 2, 2)), r"expected .*\(1\+J,5\+K\) .*, got .*, around \(2, 2, 2\)"),
        ((frame, grid, torch.zeros(1, 10), torch.zeros(5, 2, 2)), "expected .*K up to 4 planes around, got"),
        ((frame[..., :2], grid, curve), r"expected \(H,W,3\), .*got frame \(5, 6, 2\)"),
        ((frame, torch.zeros(12, 9, 2, 2), curve), r"expected .*got .*grid \(12, 9, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=f"slice_apply_frame: {message}"):
            slice_apply_frame(*bad)
