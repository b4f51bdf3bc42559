"""ConvLSTM: what is refused, by name, and that nothing else crashes whatever its shape, dtype and memory layout."""

from __future__ import annotations

import re

import pytest
import torch
from convlstm_cases import (
    NAMES,
    Shape,
    arguments,
    assert_gradients,
    assert_values,
    exact_copies,
    literal,
    loss_weights,
    magnitudes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlv2v.kernels import BACKENDS, convlstm, convlstm_cells, explain
from rlv2v.kernels.reference import LIMITS

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = {
    "x": (2, 3, 4, 6, 5),
    "w_x": (8, 4, 3, 3),
    "w_h": (8, 2, 3, 3),
    "bias": (8,),
    "h0": (2, 2, 6, 5),
    "c0": (2, 2, 6, 5),
}
GROUPED = {name: (3, *shape) for name, shape in GOOD.items()}
X_SHAPE = "x must be (B,T,C_in,H,W) with T, C_in, H, W >= 1"
W_SHAPE = "w_h must be (4C,C,k,k) with k 1, 3 or 5"


def zeros(shapes: dict[str, tuple[int, ...]] = GOOD, **other: Tensor) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | other


def assert_refused(message: str, arguments: dict[str, object], **options: object) -> None:
    for call in (convlstm, convlstm_cells) if options else (convlstm, convlstm_cells, explain):
        with pytest.raises(ValueError, match=re.escape(f"convlstm: {message}")):
            call(**arguments, **options)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (), f"{X_SHAPE}, got ()"),
        ("x", (3, 4, 6, 5), f"{X_SHAPE}, got (3, 4, 6, 5)"),
        ("x", (1, 1, 1, 2, 3, 4, 5), f"{X_SHAPE}, got (1, 1, 1, 2, 3, 4, 5)"),
        ("x", (2, 0, 4, 6, 5), f"{X_SHAPE}, got (2, 0, 4, 6, 5)"),
        ("x", (2, 3, 0, 6, 5), f"{X_SHAPE}, got (2, 3, 0, 6, 5)"),
        ("x", (2, 3, 4, 0, 5), f"{X_SHAPE}, got (2, 3, 4, 0, 5)"),
        ("x", (2, 3, 4, 6, 0), f"{X_SHAPE}, got (2, 3, 4, 6, 0)"),
        ("w_h", (8, 2, 2, 2), f"{W_SHAPE}, got (8, 2, 2, 2)"),
        ("w_h", (8, 2, 7, 7), f"{W_SHAPE}, got (8, 2, 7, 7)"),
        ("w_h", (8, 2, 3, 5), f"{W_SHAPE}, got (8, 2, 3, 5)"),
        ("w_h", (8, 2, 0, 0), f"{W_SHAPE}, got (8, 2, 0, 0)"),
        ("w_h", (6, 2, 3, 3), f"{W_SHAPE}, got (6, 2, 3, 3)"),
        ("w_h", (0, 0, 3, 3), f"{W_SHAPE}, got (0, 0, 3, 3)"),
        ("w_h", (2, 3, 3), f"{W_SHAPE}, got (2, 3, 3)"),
        ("w_h", (), f"{W_SHAPE}, got ()"),
        ("w_h", (1, 8, 2, 3, 3), f"{W_SHAPE}, got (1, 8, 2, 3, 3)"),
        ("w_x", (8, 3, 3, 3), "w_x must be (8, 4, 3, 3), got (8, 3, 3, 3)"),
        ("w_x", (4, 4, 3, 3), "w_x must be (8, 4, 3, 3), got (4, 4, 3, 3)"),
        ("w_x", (8, 4, 5, 5), "w_x must be (8, 4, 3, 3), got (8, 4, 5, 5)"),
        ("w_x", (8, 4), "w_x must be (8, 4, 3, 3), got (8, 4)"),
        ("bias", (4,), "bias must be (8,), got (4,)"),
        ("bias", (8, 1), "bias must be (8,), got (8, 1)"),
        ("h0", (1, 2, 6, 5), "h0 must be (2, 2, 6, 5), got (1, 2, 6, 5)"),
        ("c0", (2, 2, 5, 6), "c0 must be (2, 2, 6, 5), got (2, 2, 5, 6)"),
        ("c0", (2, 1, 2, 6, 5), "c0 must be (2, 2, 6, 5), got (2, 1, 2, 6, 5)"),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    assert_refused(message, zeros(GOOD | {name: shape}))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (0, 2, 3, 4, 6, 5), "x must be (G,B,T,C_in,H,W) with T, C_in, H, W >= 1, got (0, 2, 3, 4, 6, 5)"),
        ("w_h", (8, 2, 3, 3), "w_h must be (G,4C,C,k,k) with k 1, 3 or 5, got (8, 2, 3, 3)"),
        ("w_x", (2, 8, 4, 3, 3), "w_x must be (3, 8, 4, 3, 3), got (2, 8, 4, 3, 3)"),
        ("bias", (8,), "bias must be (3, 8), got (8,)"),
        ("h0", (2, 2, 6, 5), "h0 must be (3, 2, 2, 6, 5), got (2, 2, 6, 5)"),
    ],
)
def test_a_wrong_shape_in_groups_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    assert_refused(message, zeros(GROUPED | {name: shape}))


def test_groups_of_weights_that_differ_are_named() -> None:
    weights = zeros(GROUPED)["w_h"][:2]
    assert_refused("w_h must be (3, 8, 2, 3, 3), got (2, 8, 2, 3, 3)", zeros(GROUPED, w_h=weights))


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize(
    ("dtype", "of_x"),
    [(torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_a_dtype_that_is_not_xs_is_named(name: str, dtype: torch.dtype, of_x: torch.dtype) -> None:
    inputs = {key: a.to(of_x) for key, a in zeros().items()}
    inputs[name] = inputs[name].to(dtype)
    assert_refused(f"{name} must be {of_x} on cpu like x, got {dtype} on cpu", inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_cannot_be_computed_with_is_named(dtype: torch.dtype) -> None:
    assert_refused(f"x must be one of {[str(good) for good in LIMITS]}, got {dtype}", zeros(x=zeros()["x"].to(dtype)))


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_device_that_is_not_xs_is_named(name: str) -> None:
    elsewhere = torch.zeros(GOOD[name], device="meta")
    assert_refused(f"{name} must be torch.float32 on cpu like x, got torch.float32 on meta", zeros(**{name: elsewhere}))


def test_x_on_another_device_is_named() -> None:
    message = "w_x must be torch.float32 on meta like x, got torch.float32 on cpu"
    assert_refused(message, zeros(x=torch.zeros(GOOD["x"], device="meta")))


def test_all_on_the_meta_device_gives_shapes() -> None:
    inputs = {name: torch.zeros(shape, device="meta") for name, shape in GOOD.items()}
    hs, (h, c) = convlstm(**inputs)
    assert hs.shape == (2, 3, 2, 6, 5)
    assert h.shape == c.shape == GOOD["h0"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_tensor_is_named(name: str, autocast: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert_refused(f"{name} must be a tensor, got list", zeros(**{name: [0.0]}))
        if name not in ("h0", "c0"):
            assert_refused(f"{name} must be a tensor, got NoneType", zeros(**{name: None}))


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_layout_is_named(name: str) -> None:
    assert_refused(f"{name} must be strided, got torch.sparse_coo", zeros(**{name: zeros()[name].to_sparse()}))


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
def test_anomaly_mode_names_what_is_not_finite(name: str, value: float) -> None:
    inputs = zeros()
    inputs[name].view(-1)[:2] = value
    convlstm(**inputs)
    with torch.autograd.set_detect_anomaly(True):
        assert_refused(f"{name} must be finite in anomaly mode, got 2 values that are not", inputs)
        convlstm(**zeros())


LAYOUTS = ("contiguous", "turned", "expanded", "offset", "second")


def laid(values: Tensor, layout: str, axis: int) -> Tensor:
    """In memory as the layout says, amid NaN where there is more of it; "expanded" repeats one slice along an axis."""
    nan = float("nan")
    if layout == "turned":
        return values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    if layout == "expanded":
        axis %= values.dim()
        return values.narrow(axis, 0, min(1, values.shape[axis])).expand_as(values)
    if layout == "offset":
        buffer = values.new_full([n + 3 for n in values.shape], nan)
        view = buffer[tuple(slice(2, 2 + n) for n in values.shape)]
        return view.copy_(values)
    if layout == "second":
        buffer = values.new_full([2 * n for n in values.shape], nan)
        view = buffer[tuple(slice(1, None, 2) for _ in values.shape)]
        return view.copy_(values)
    return values


RUNS = [
    (backend, dtype)
    for backend in ("auto", "eager", "reference", "cpu")
    for dtype in LIMITS
    if not (backend == "cpu" and dtype == torch.float64)
]
shapes = st.builds(
    Shape,
    batch=st.integers(0, 3),
    steps=st.integers(1, 4),
    inputs=st.integers(1, 9),
    channels=st.integers(1, 9),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    kernel=st.sampled_from((1, 3, 5)),
    groups=st.sampled_from((0, 0, 1, 2)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=shapes,
    run=st.sampled_from(RUNS),
    recompute=st.booleans(),
    state=st.sampled_from(("state", "zero", "h0 alone", "c0 alone")),
    wanted=st.sets(st.sampled_from(NAMES)),
    layouts=st.tuples(*[st.tuples(st.sampled_from(LAYOUTS), st.integers(0, 5)) for _ in NAMES]),
    weights_layout=st.tuples(st.sampled_from(LAYOUTS), st.integers(0, 5)),
    seed=st.integers(0, 99),
)
def test_any_call_keeps_the_limits(
    shape: Shape,
    run: tuple[str, torch.dtype],
    recompute: bool,
    state: str,
    wanted: set[str],
    layouts: tuple[tuple[str, int], ...],
    weights_layout: tuple[str, int],
    seed: int,
) -> None:
    backend, dtype = run
    # Half the unit size: where the gates saturate, a rounding error of theirs is large beside the slope that is left.
    halves = [None if a is None else a.detach() / 2 for a in arguments(shape, dtype, state, seed)]
    inputs = [
        None if a is None else laid(a, *layout).detach().requires_grad_(name in wanted)
        for name, a, layout in zip(NAMES, halves, layouts, strict=True)
    ]
    exact = exact_copies(inputs)
    hs, cs = convlstm_cells(*inputs, backend=backend, recompute=recompute)
    right = literal(*exact)
    assert_values(hs, cs, right, dtype)
    if not hs.requires_grad:
        # The reference alone leaves out what has no part: w_h where there is one frame and no h0.
        assert backend == "reference" or not any(a is not None and a.requires_grad for a in inputs)
        return
    weights = [laid(a, *weights_layout) for a in loss_weights(hs.shape, dtype)]
    of_ours = {name: a for name, a in zip(NAMES, inputs, strict=True) if a is not None and a.requires_grad}
    found = torch.autograd.grad((hs, cs), list(of_ours.values()), weights, allow_unused=True)
    of_exact = dict(zip(NAMES, exact, strict=True))
    wide = [a.double() for a in weights]
    want = torch.autograd.grad(right, [of_exact[name] for name in of_ours], wide, allow_unused=True)
    sizes = [
        magnitudes([None if a is None else a[n] for a in exact], *(a[n] for a in wide)) for n in range(shape.groups)
    ] or [magnitudes(exact, *wide)]
    scales = {name: torch.stack([of_group[name] for of_group in sizes]) for name in NAMES}
    assert_gradients(
        dict(zip(of_ours, found, strict=True)), dict(zip(of_ours, want, strict=True)), dtype, scales=scales
    )
