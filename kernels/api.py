"""The public entry: checks what came, brings it into the operators' form, and runs the sequence on a backend."""

from __future__ import annotations

import torch
from torch import Tensor

from rlv2v.kernels import ops as _ops  # noqa: F401  (registers the operators)
from rlv2v.kernels.dispatch import BACKENDS, Choice, Problem, check_backend, choose
from rlv2v.kernels.layout import dense, state_dtype
from rlv2v.kernels.reference import LIMITS, convlstm_ref


def convlstm(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run a ConvLSTM over a sequence, or G of one shape at once.

        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g);  c' = f c + i g;  h' = o tanh(c')
        with a = w_x * x + w_h * h + bias                (* is a convolution, stride 1, same padding)
    Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes.

    float64, float32, bfloat16 or float16; the pointwise maths and the cells are float32 where x has 16 bits. Under
    autocast x, h0 and the weights are cast to its dtype. Fastest with x dense in the order T,B,H,W,C; hs comes back
    so, seen in the shape below.

    Args:
        x: input sequence (B,T,C_in,H,W); T, C_in, H, W >= 1. With a leading axis G of x, every argument and result has
            one: G calls in one.
        w_x: (4C,C_in,k,k), gate order i, f, o, g; k is 1, 3 or 5.
        w_h: (4C,C,k,k).
        bias: (4C,).
        h0: hidden state before the first frame (B,C,H,W); zero when None.
        c0: cell before the first frame (B,C,H,W), of x's dtype or float32; zero when None.
        backend: "auto" (by the table of `rlv2v.kernels.dispatch`; `explain` says which) or a name from `BACKENDS`.
        recompute: keep 6 instead of 14 bytes an element and step for the backward (16-bit dtypes), which then
            convolves x and all h once more.

    Returns:
        `hs, (h_T, c_T)`: hs (B,T,C,H,W), the last hidden state and the last cell (B,C,H,W); c_T is float32 where x has
        16 bits.

    Raises:
        ValueError: a shape, dtype or device that does not fit, a backend that is unknown or cannot run this, or, in
            PyTorch's anomaly mode, an argument with a value that is not finite; names it, what was expected and what
            came.
    """
    hs, cs = convlstm_cells(x, w_x, w_h, bias, h0, c0, backend=backend, recompute=recompute)
    axis = x.dim() - 4
    return hs, (hs.select(axis, -1), cs.select(axis, -1))


def convlstm_cells(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `convlstm`, but the state after *every* frame, to fork the sequence from: `hs, cs`, each (B,T,C,H,W)."""
    check_backend(backend)
    x, w_x, w_h, bias, h0, c0 = prepared(x, w_x, w_h, bias, h0, c0)
    grouped = x.dim() == 6
    if not grouped:
        x, w_x, w_h, bias = (tensor.unsqueeze(0) for tensor in (x, w_x, w_h, bias))
        h0, c0 = (None if state is None else state.unsqueeze(0) for state in (h0, c0))
    if backend == "reference":
        of_group = [
            convlstm_ref(x[g], w_x[g], w_h[g], bias[g], None if h0 is None else h0[g], None if c0 is None else c0[g])
            for g in range(x.shape[0])
        ]
        hs, cs = (torch.stack(part) for part in zip(*of_group, strict=True))
    else:
        given = [x, w_x, w_h, bias, *(state for state in (h0, c0) if state is not None)]
        keep_gates = not recompute and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        hs, cs, _ = torch.ops.rlv2v.convlstm(dense(x.transpose(1, 2)), w_x, w_h, bias, h0, c0, backend, keep_gates)
        hs, cs = hs.transpose(1, 2), cs.transpose(1, 2)
    return (hs, cs) if grouped else (hs.squeeze(0), cs.squeeze(0))


def explain(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None = None, c0: Tensor | None = None
) -> Choice:
    """Which backend `backend="auto"` runs for these arguments, why, and why none of the others; print it.

    Raises:
        ValueError: as `convlstm`.
    """
    x, w_x, w_h, *_ = prepared(x, w_x, w_h, bias, h0, c0)
    if x.dim() == 5:
        x, w_h = x.unsqueeze(0), w_h.unsqueeze(0)
    return choose(Problem.of(x.transpose(1, 2), w_h))


def prepared(
    x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments as autocast wants them, checked; c0 in `state_dtype`."""
    kind = x.device.type if isinstance(x, Tensor) else "meta"
    if kind != "meta" and torch.is_autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        x, w_x, w_h, bias = (autocast(tensor, to) for tensor in (x, w_x, w_h, bias))
        h0 = None if h0 is None else autocast(h0, to)
    check_arguments(x, w_x, w_h, bias, h0, c0)
    if c0 is not None:
        c0 = c0.to(state_dtype(x.dtype))
    return x, w_x, w_h, bias, h0, c0


def autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as torch's own autocast does: floating point, but not float64. What is no tensor is left for the checks."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def check_arguments(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, h0: Tensor | None, c0: Tensor | None) -> None:
    """Raise ValueError for the first argument whose type, rank, shape, dtype or device does not fit the others."""
    given = {"x": x, "w_x": w_x, "w_h": w_h, "bias": bias, "h0": h0, "c0": c0}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("h0", "c0")):
            raise ValueError(f"convlstm: {name} must be a tensor, got {type(tensor).__name__}")
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise ValueError(f"convlstm: {name} must be strided, got {tensor.layout}")
    if x.dtype not in LIMITS:
        raise ValueError(f"convlstm: x must be one of {[str(dtype) for dtype in LIMITS]}, got {x.dtype}")
    group = "G," if x.dim() == 6 else ""
    outer = tuple(x.shape[:1]) if group else ()
    if x.dim() not in (5, 6) or min(x.shape[-4:]) < 1 or 0 in outer:
        raise ValueError(f"convlstm: x must be ({group}B,T,C_in,H,W) with T, C_in, H, W >= 1, got {tuple(x.shape)}")
    kernels = w_h.shape[-2:]
    if (
        w_h.dim() != len(outer) + 4
        or w_h.shape[-4] != 4 * w_h.shape[-3]
        or w_h.shape[-3] < 1
        or kernels not in ((1, 1), (3, 3), (5, 5))
    ):
        raise ValueError(f"convlstm: w_h must be ({group}4C,C,k,k) with k 1, 3 or 5, got {tuple(w_h.shape)}")
    batch, _, c_in, height, width = x.shape[-5:]
    channels = w_h.shape[-3]
    expected = {
        "w_x": (*outer, 4 * channels, c_in, *kernels),
        "w_h": (*outer, *w_h.shape[-4:]),
        "bias": (*outer, 4 * channels),
    }
    expected |= dict.fromkeys(("h0", "c0"), (*outer, batch, channels, height, width))
    for name, shape in expected.items():
        tensor = given[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"convlstm: {name} must be {shape}, got {tuple(tensor.shape)}")
        dtypes = {x.dtype, state_dtype(x.dtype)} if name == "c0" else {x.dtype}
        if tensor.dtype not in dtypes or tensor.device != x.device:
            raise ValueError(
                f"convlstm: {name} must be {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device}"
            )
    # Dynamo cannot trace the question, nor could it a branch on values.
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
        for name, tensor in given.items():
            if tensor is not None and not tensor.isfinite().all():
                count = tensor.numel() - int(tensor.isfinite().sum())
                raise ValueError(f"convlstm: {name} must be finite in anomaly mode, got {count} values that are not")


__all__ = ["BACKENDS", "convlstm", "convlstm_cells", "explain"]
