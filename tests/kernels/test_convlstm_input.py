"""ConvLSTM: bad input is refused by name, and good input may have any memory layout."""

from __future__ import annotations

import re
from typing import Any

import convlstm_cases as cases
import pytest
import torch
from convlstm_cases import NAMES, RUNS, Run, arguments
from torch import Tensor

from rlv2v.kernels import BACKENDS, convlstm, convlstm_cells, explain

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = {"x": (2, 3, 4, 6, 5), "w_x": (8, 4, 3, 3), "w_h": (8, 2, 3, 3), "bias": (8,)}
GOOD |= dict.fromkeys(("h0", "c0"), (2, 2, 6, 5))
GROUPED = {name: (3, *shape) for name, shape in GOOD.items()}


def zeros(shapes: dict[str, tuple[int, ...]] = GOOD, **changes: object) -> dict[str, Any]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def assert_refused(message: str, arguments: dict[str, Any], **options: object) -> None:
    for call in (convlstm, convlstm_cells) if options else (convlstm, convlstm_cells, explain):
        with pytest.raises(ValueError, match=re.escape(f"convlstm: {message}")):
            call(**arguments, **options)


X_SHAPES = [(), (3, 4, 6, 5), (1, 1, 1, 2, 3, 4, 5), (2, 0, 4, 6, 5), (2, 3, 0, 6, 5), (2, 3, 4, 6, 0)]
W_SHAPES = [(8, 2, 2, 2), (8, 2, 7, 7), (8, 2, 3, 5), (6, 2, 3, 3), (0, 0, 3, 3), (2, 3, 3), (), (1, 8, 2, 3, 3)]
SHAPES = [("w_x", (8, 3, 3, 3)), ("w_x", (4, 4, 3, 3)), ("w_x", (8, 4, 5, 5)), ("w_x", (8, 4)), ("bias", (4,))]
SHAPES += [("bias", (8, 1)), ("h0", (1, 2, 6, 5)), ("c0", (2, 2, 5, 6)), ("c0", (2, 1, 2, 6, 5))]
GROUPED_SHAPES = [("w_x", (2, 8, 4, 3, 3)), ("w_h", (2, 8, 2, 3, 3)), ("bias", (8,)), ("h0", (2, 2, 6, 5))]
X_DTYPES = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
LIKE_X = "must be torch.float32 on cpu like x, got"
REFUSED = [
    *((f"x must be (B,T,C_in,H,W) with T, C_in, H, W >= 1, got {shape}", GOOD | {"x": shape}) for shape in X_SHAPES),
    *((f"w_h must be (4C,C,k,k) with k 1, 3 or 5, got {shape}", GOOD | {"w_h": shape}) for shape in W_SHAPES),
    *((f"{name} must be {GOOD[name]}, got {shape}", GOOD | {name: shape}) for name, shape in SHAPES),
    *((f"{name} must be {GROUPED[name]}, got {shape}", GROUPED | {name: shape}) for name, shape in GROUPED_SHAPES),
    ("x must be (G,B,T,C_in,H,W) with T, C_in, H, W >= 1, got (0, 2, 3, 4, 6, 5)", GROUPED | {"x": (0, *GOOD["x"])}),
    ("w_h must be (G,4C,C,k,k) with k 1, 3 or 5, got (8, 2, 3, 3)", GROUPED | {"w_h": GOOD["w_h"]}),
]
REFUSED = [(message, zeros(shapes)) for message, shapes in REFUSED]
REFUSED += [
    *(
        (f"{name} {LIKE_X} {dtype} on cpu", zeros(**{name: torch.zeros(GOOD[name], dtype=dtype)}))
        for name in NAMES[1:]
        for dtype in (torch.float64, torch.bfloat16)
    ),
    *((f"{name} {LIKE_X} torch.float32 on meta", zeros(**{name: zeros()[name].to("meta")})) for name in NAMES[1:]),
    ("w_x must be torch.float32 on meta like x, got torch.float32 on cpu", zeros(x=zeros()["x"].to("meta"))),
    *(
        (f"x must be one of {[str(known) for known in cases.DTYPES]}, got {dtype}", zeros(x=zeros()["x"].to(dtype)))
        for dtype in X_DTYPES
    ),
    *((f"{name} must be strided, got torch.sparse_coo", zeros(**{name: zeros()[name].to_sparse()})) for name in NAMES),
]


@pytest.mark.parametrize(("message", "arguments"), REFUSED, ids=[message for message, _ in REFUSED])
def test_an_argument_that_does_not_fit_is_named(message: str, arguments: dict[str, Any]) -> None:
    assert_refused(message, arguments)


@pytest.mark.parametrize(("shapes", "groups"), [(GOOD, ()), (GROUPED, (3,))])
def test_all_on_the_meta_device_gives_shapes(shapes: dict[str, tuple[int, ...]], groups: tuple[int, ...]) -> None:
    hs, (h, c) = convlstm(**{name: torch.zeros(shape, device="meta") for name, shape in shapes.items()})
    assert hs.shape == (*groups, 2, 3, 2, 6, 5)
    assert h.shape == c.shape == shapes["h0"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_anything_but_a_tensor_is_named(name: str, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_refused(f"{name} must be a tensor, got list", zeros(**{name: [0.0]}))
        if name not in ("h0", "c0"):
            assert_refused(f"{name} must be a tensor, got NoneType", zeros(**{name: None}))


@pytest.mark.parametrize("backend", ["cudnn", "", "AUTO", None])
def test_an_unknown_backend_is_refused(backend: str) -> None:
    assert_refused(
        f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}", dict(zeros()), backend=backend
    )


def test_a_backend_that_cannot_run_here_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"convlstm: backend 'cuda' cannot run this: .+"):
        convlstm(**zeros(), backend="cuda")


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_fused_backends_refuse_float64(backend: str) -> None:
    with pytest.raises(ValueError, match=rf"'{backend}' cannot run this: .*float32 at most, x is torch.float64"):
        convlstm(**{name: a.double() for name, a in zeros().items()}, backend=backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_anomaly_mode_names_a_nan_or_infinity(name: str, value: float) -> None:
    inputs = zeros()
    inputs[name].view(-1)[:2] = value
    convlstm(**inputs)
    with torch.autograd.set_detect_anomaly(True):
        assert_refused(f"{name} must be finite in anomaly mode, got 2 values that are not", inputs)
        convlstm(**zeros())


LAYOUTS = ("contiguous", "turned", "expanded", "offset", "second")


def lay_out(values: Tensor, layout: str, axis: int) -> Tensor:
    """Return values as a new leaf in a memory layout, amid NaN where it has gaps; "expanded" repeats a slice."""
    nan = float("nan")
    if layout == "turned":
        return values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    if layout == "expanded":
        return values.narrow(axis % values.dim(), 0, 1).expand_as(values)
    if layout == "offset":
        buffer = values.new_full([n + 3 for n in values.shape], nan)
        return buffer[tuple(slice(2, 2 + n) for n in values.shape)].copy_(values)
    if layout == "second":
        buffer = values.new_full([2 * n for n in values.shape], nan)
        return buffer[tuple(slice(1, None, 2) for _ in values.shape)].copy_(values)
    return values


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_any_memory_layout_keeps_the_limits(first: int, run: Run) -> None:
    def turn(tensors: cases.Tensors) -> list[Tensor]:
        """Return the tensors in the layouts one after the other."""
        return [lay_out(a.detach(), LAYOUTS[(first + n) % len(LAYOUTS)], first + n) for n, a in enumerate(tensors)]

    shape = cases.SHAPES[0]
    inputs = [a.requires_grad_() for a in turn(arguments(shape, run.dtype))]
    hs, cs = convlstm_cells(*inputs, **run.options)
    exact = cases.exact_copies(inputs)
    right = cases.literal(*exact)
    cases.assert_values(hs, cs, right, run.dtype, shape.value_terms)
    weights = turn(cases.loss_weights(hs.shape, run.dtype))
    got = torch.autograd.grad((hs, cs), inputs, weights)
    want = torch.autograd.grad(right, exact, [a.double() for a in weights])
    ours, theirs = (dict(zip(NAMES, gradients, strict=True)) for gradients in (got, want))
    cases.assert_gradients(ours, theirs, run.dtype, shape.gradient_terms)
