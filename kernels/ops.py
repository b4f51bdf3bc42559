"""The ConvLSTM as torch.library operators, so that autograd, torch.compile and export see one node a sequence.

    rlv2v::convlstm            x, w_x, w_h, bias, h0, c0 -> hs, cs, gates   (gates: empty unless kept for the backward)
    rlv2v::convlstm_backward   dhs, dcs and what was saved -> gradients       (empty where not wanted)
All with a group axis, in the layout of `rlv2v.kernels.layout`: x (G,T,B,C_in,H,W), hs, cs (G,T,B,C,H,W), gates
(G,T,B,4C,H,W), weights (G,4C,C_in,k,k), (G,4C,C,k,k), bias (G,4C), states (G,B,C,H,W). The loop over T is inside:
crossing the boundary costs as much as a frame's arithmetic in a small network. There is no second derivative; the
reference has one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlv2v.kernels import driver
from rlv2v.kernels.dispatch import Problem, recurrence
from rlv2v.kernels.layout import channels_last, dense, empty_frames, gates_dtype, like_weight, state_dtype

LIBRARY = torch.library.Library("rlv2v", "DEF")
INPUTS = "Tensor x, Tensor w_x, Tensor w_h, Tensor bias, Tensor? h0, Tensor? c0"
LIBRARY.define(f"convlstm({INPUTS}, str backend, bool keep_gates) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"convlstm_backward(Tensor? dhs, Tensor? dcs, {INPUTS}, Tensor hs, Tensor cs, Tensor gates, str backend, "
    "bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    backend: str,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    run = recurrence(backend, Problem.of(x, w_h))
    with as_given(x.device.type):
        return forward_by(run, x, w_x, w_h, bias, h0, c0, keep_gates)


def forward_by(
    run: driver.Recurrence,
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rlv2v::convlstm` by a given recurrence."""
    hs, cs, gates = driver.forward(
        run, dense(x), w_x, like_weight(w_h, w_h), bias, optional(h0), optional(c0), keep_gates
    )
    return hs, cs, not_kept(x) if gates is None else gates


def forward_fake(
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    backend: str,
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, steps, batch, _, height, width = x.shape
    channels = w_h.shape[2]
    shape, of_gates = ((groups, steps, batch, n, height, width) for n in (channels, 4 * channels))
    gates = empty_frames(x, *of_gates, dtype=gates_dtype(x.dtype)) if keep_gates else not_kept(x)
    return empty_frames(x, *shape), empty_frames(x, *shape, dtype=state_dtype(x.dtype)), gates


def backward(
    dhs: Tensor | None,
    dcs: Tensor | None,
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    hs: Tensor,
    cs: Tensor,
    gates: Tensor,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, ...]:
    run = recurrence(backend, Problem.of(x, w_h))
    with as_given(x.device.type):
        return backward_by(run, dhs, dcs, x, w_x, w_h, bias, h0, c0, hs, cs, gates, need)


def backward_by(
    run: driver.Recurrence,
    dhs: Tensor | None,
    dcs: Tensor | None,
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    hs: Tensor,
    cs: Tensor,
    gates: Tensor,
    need: list[bool],
) -> tuple[Tensor, ...]:
    """`rlv2v::convlstm_backward` by a given recurrence."""
    dhs = torch.zeros_like(hs) if dhs is None else dense(dhs)
    kept = None if gates.dim() == 1 else gates
    dx, *of_weights, dh0, dc0 = driver.backward(
        run,
        dhs,
        optional(dcs),
        dense(x),
        w_x,
        like_weight(w_h, w_h),
        bias,
        optional(h0),
        optional(c0),
        hs,
        cs,
        kept,
        need,
    )
    # The library chooses their layout by the shape; the fake can only follow the weights.
    of_weights = [
        None if gradient is None else like_weight(gradient, w)
        for gradient, w in zip(of_weights, (w_x, w_h, bias), strict=True)
    ]
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in (dx, *of_weights, dh0, dc0))


def backward_fake(
    dhs: Tensor | None,
    dcs: Tensor | None,
    x: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    bias: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    hs: Tensor,
    cs: Tensor,
    gates: Tensor,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, ...]:
    groups, _, *state = hs.shape
    gradients = (
        empty_frames(x, *x.shape),
        *(empty_frames(w, *w.shape) if channels_last(w) else w.new_empty(w.shape) for w in (w_x, w_h, bias)),
        empty_frames(hs, groups, *state),
        empty_frames(cs, groups, *state),
    )
    return tuple(g if wanted else x.new_empty(0) for g, wanted in zip(gradients, need, strict=True))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def differentiate(ctx: Any, dhs: Tensor | None, dcs: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:6])
    saved = ctx.saved_tensors
    if dhs is None and dcs is None:
        return (None,) * 8
    gradients = torch.ops.rlv2v.convlstm_backward(dhs, dcs, *saved, ctx.backend, need)
    return *(g if wanted else None for g, wanted in zip(gradients, need, strict=True)), None, None


def remember_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[-2]


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise ValueError(f"convlstm: backend must be 'reference' for a second derivative, got {ctx.backend!r}")


def as_given(device_type: str) -> AbstractContextManager[object]:
    """Autocast stays active inside an operator, and would change the convolutions' dtype under code with pointers."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def optional(state: Tensor | None) -> Tensor | None:
    return None if state is None else dense(state)


def not_kept(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=gates_dtype(x.dtype))


LIBRARY.impl("convlstm", forward, "CompositeExplicitAutograd")
LIBRARY.impl("convlstm_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlv2v::convlstm", forward_fake, lib=LIBRARY)
torch.library.register_fake("rlv2v::convlstm_backward", backward_fake, lib=LIBRARY)
torch.library.register_autograd("rlv2v::convlstm", differentiate, setup_context=setup_context, lib=LIBRARY)
# Without this, autograd would record what a backend does inside, or miss it where pointers do the work.
torch.library.register_autograd(
    "rlv2v::convlstm_backward", no_second_derivative, setup_context=remember_backend, lib=LIBRARY
)
