"""One entry to the ConvLSTM for every backend: checks what came, picks the backend, runs the sequence."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rlv2v.kernels.reference import convlstm_ref
from rlv2v.kernels.sequence import convlstm_sequence

Sequence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
BACKENDS: dict[str, Sequence] = {"reference": convlstm_ref, "sequence": convlstm_sequence}
AUTO = "sequence"


def convlstm(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a ConvLSTM over a sequence.

        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g);  c' = f c + i g;  h' = o tanh(c')
        with a = w_x * x + w_h * h + bias
    Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes.

    Args:
        x: input sequence (B,T,C_in,H,W), T >= 1.
        w_x: (4C,C_in,k,k), gate order i, f, o, g; k odd.
        w_h: (4C,C,k,k).
        bias: (4C,).
        h0: hidden state before the first frame (B,C,H,W); zero when None.
        c0: cell before the first frame (B,C,H,W); zero when None.
        backend: "auto" (the fastest that fits) or a name from `BACKENDS`.

    Returns:
        `hs, (h_T, c_T)`: hs (B,T,C,H,W), the last hidden state and the last cell (B,C,H,W).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown backend; names it.
    """
    hs, cs = convlstm_cells(x, w_x, w_h, bias, h0, c0, backend=backend)
    return hs, (hs[:, -1], cs[:, -1])


def convlstm_cells(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `convlstm`, but the state after *every* frame, to fork the sequence from: `hs, cs`, each (B,T,C,H,W)."""
    check_arguments(x, w_x, w_h, bias, h0, c0)
    return resolve(backend)(x, w_x, w_h, bias, h0, c0)


def resolve(backend: str) -> Sequence:
    """The function behind a backend's name; `auto` is `AUTO`, the fastest there is."""
    name = AUTO if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"convlstm: backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    return BACKENDS[name]


def check_arguments(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None) -> None:
    """Raise ValueError for the first argument whose rank, shape, dtype or device does not fit the others."""
    if x.dim() != 5 or x.shape[1] < 1:
        raise ValueError(f"convlstm: x must be (B,T,C_in,H,W) with T >= 1, got {tuple(x.shape)}")
    if w_h.dim() != 4 or w_h.shape[0] != 4 * w_h.shape[1] or w_h.shape[2] != w_h.shape[3] or w_h.shape[2] % 2 == 0:
        raise ValueError(f"convlstm: w_h must be (4C,C,k,k) with odd k, got {tuple(w_h.shape)}")
    batch, _, c_in, height, width = x.shape
    channels, k = w_h.shape[1], w_h.shape[2]
    expected = {"w_x": (4 * channels, c_in, k, k), "bias": (4 * channels,)}
    expected |= dict.fromkeys(("h0", "c0"), (batch, channels, height, width))
    for name, tensor in (("w_x", w_x), ("w_h", w_h), ("bias", bias), ("h0", h0), ("c0", c0)):
        if tensor is None:
            continue
        if name in expected and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"convlstm: {name} must be {expected[name]}, got {tuple(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"convlstm: {name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
            )
