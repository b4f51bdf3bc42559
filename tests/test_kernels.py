"""ConvLSTM: every backend against the textbook loop in fp64, forward and backward, at shapes that are not kind."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels import BACKENDS, convlstm, convlstm_cells

# (B, T, C_in, C, H, W, k)
SHAPES = [
    (2, 4, 3, 5, 7, 6, 3),
    (1, 3, 4, 2, 5, 9, 1),
    (2, 3, 1, 3, 11, 4, 5),
    (3, 1, 2, 2, 4, 4, 3),
    (2, 5, 3, 4, 1, 1, 3),
]
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 5e-6)}  # forward, relative gradients


def literal(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h: Tensor | None, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shi et al. 2015, eq. 3: one convolution of [x_t, h] a step."""
    zeros = x.new_zeros(x.shape[0], w_h.shape[1], *x.shape[-2:])
    h, c = zeros if h is None else h, zeros if c is None else c
    weight, padding = torch.cat((w_x, w_h), 1), w_h.shape[-1] // 2
    hs, cs = [], []
    for t in range(x.shape[1]):
        i, f, o, g = conv2d(torch.cat((x[:, t], h), 1), weight, bias, padding=padding).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1)


def arguments(shape: tuple[int, ...], *, state: bool = True, seed: int = 0) -> list[Tensor | None]:
    b, t, c_in, c, h, w, k = shape
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    w_x = normal(4 * c, c_in, k, k) / (c_in * k * k) ** 0.5
    w_h = normal(4 * c, c, k, k) / (c * k * k) ** 0.5
    states = (normal(b, c, h, w), normal(b, c, h, w)) if state else (None, None)
    return [normal(b, t, c_in, h, w), w_x, w_h, normal(4 * c), *states]


def copies(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if a is None else a.to(dtype).detach().clone().requires_grad_() for a in tensors]


def gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor | None]) -> list[Tensor]:
    """Of a fixed weighting of all hidden states and cells, to every input there is."""
    rng = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(o.shape, generator=rng, dtype=torch.float64) * o).sum() for o in outputs)
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, [a for a in inputs if a is not None], materialize_grads=True))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "zero"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_textbook(
    shape: tuple[int, ...], state: bool, dtype: torch.dtype, backend: str
) -> None:
    rounded = [None if a is None else a.to(dtype).double() for a in arguments(shape, state=state)]
    exact, ours = copies(rounded, torch.float64), copies(rounded, dtype)
    want, got = literal(*exact), convlstm_cells(*ours, backend=backend)
    value_limit, gradient_limit = TOLERANCE[dtype]
    for a, b in zip(want, got, strict=True):
        assert b.dtype == dtype
        assert (a - b).abs().max() <= value_limit
    for a, b in zip(gradients(want, exact), gradients(got, ours), strict=True):
        assert (a - b).norm() <= gradient_limit * a.norm().clamp(min=1e-12)


@pytest.mark.parametrize("alone", ["h0", "c0"])
def test_one_half_of_the_state_may_be_left_out(alone: str) -> None:
    given = dict(zip(("x", "w_x", "w_h", "bias", "h0", "c0"), arguments(SHAPES[0]), strict=True))
    given["h0" if alone == "c0" else "c0"] = None
    for a, b in zip(literal(*given.values()), convlstm_cells(**given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_what_contiguous_ones_give(backend: str) -> None:
    x, w_x, w_h, bias, h0, c0 = arguments(SHAPES[0])
    want = convlstm_cells(x, w_x, w_h, bias, h0, c0, backend=backend)

    def strided(a: Tensor) -> Tensor:
        """The same values behind other strides, every second element of a buffer full of NaN, axes turned."""
        buffer = torch.full((*a.shape[::-1], 2), float("nan"), dtype=a.dtype)
        view = buffer[..., 0].permute(*reversed(range(a.dim())))
        view.copy_(a)
        assert not view.is_contiguous()
        return view

    got = convlstm_cells(*(strided(a) for a in (x, w_x, w_h, bias, h0, c0)), backend=backend)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_last_state_goes_on_where_the_run_ended() -> None:
    x, *rest = arguments(SHAPES[0], state=False)
    whole, (h, c) = convlstm(x, *rest)
    torch.testing.assert_close(h, whole[:, -1], rtol=0, atol=0)
    first, state = convlstm(x[:, :1], *rest[:3])
    second, (h_end, c_end) = convlstm(x[:, 1:], *rest[:3], *state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close((h_end, c_end), (h, c), rtol=0, atol=1e-12)


GOOD = {
    "x": (2, 3, 4, 6, 5),
    "w_x": (8, 4, 3, 3),
    "w_h": (8, 2, 3, 3),
    "bias": (8,),
    "h0": (2, 2, 6, 5),
    "c0": (2, 2, 6, 5),
}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (3, 4, 6, 5), "x must be (B,T,C_in,H,W) with T >= 1, got (3, 4, 6, 5)"),
        ("x", (2, 0, 4, 6, 5), "x must be (B,T,C_in,H,W) with T >= 1, got (2, 0, 4, 6, 5)"),
        ("w_h", (8, 2, 2, 2), "w_h must be (4C,C,k,k) with odd k, got (8, 2, 2, 2)"),
        ("w_h", (6, 2, 3, 3), "w_h must be (4C,C,k,k) with odd k, got (6, 2, 3, 3)"),
        ("w_h", (8, 2, 3, 5), "w_h must be (4C,C,k,k) with odd k, got (8, 2, 3, 5)"),
        ("w_x", (8, 3, 3, 3), "w_x must be (8, 4, 3, 3), got (8, 3, 3, 3)"),
        ("w_x", (8, 4, 5, 5), "w_x must be (8, 4, 3, 3), got (8, 4, 5, 5)"),
        ("bias", (4,), "bias must be (8,), got (4,)"),
        ("h0", (1, 2, 6, 5), "h0 must be (2, 2, 6, 5), got (1, 2, 6, 5)"),
        ("c0", (2, 2, 5, 6), "c0 must be (2, 2, 6, 5), got (2, 2, 5, 6)"),
    ],
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    given = {key: torch.zeros(size) for key, size in (GOOD | {name: shape}).items()}
    with pytest.raises(ValueError, match=re.escape(f"convlstm: {message}")):
        convlstm(**given)


@pytest.mark.parametrize("name", ["w_x", "w_h", "bias", "h0", "c0"])
def test_a_wrong_dtype_is_named(name: str) -> None:
    given = {key: torch.zeros(size) for key, size in GOOD.items()}
    given[name] = given[name].double()
    with pytest.raises(ValueError, match=rf"convlstm: {name} must be torch.float32 on cpu like x, got torch.float64"):
        convlstm(**given)


def test_an_unknown_backend_is_refused() -> None:
    given = {key: torch.zeros(size) for key, size in GOOD.items()}
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of \['reference'.*\], got 'cudnn'"):
        convlstm(**given, backend="cudnn")
