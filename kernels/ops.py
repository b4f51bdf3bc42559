"""The ConvLSTM as torch.library operators, so that autograd, torch.compile and export see one node a sequence.

    rlv2v::convlstm            operands -> hs, cs, gates                (gates: empty unless kept for the backward)
    rlv2v::convlstm_backward   dhs, dcs and what was saved -> gradients of the operands   (empty where not needed)
Shapes, dtypes and layout are those of `driver.Operands` and `driver.Outputs`; a schema takes no structs, so the two are
flat there, and only there. The loop over T is inside: crossing the boundary costs as much as a frame's arithmetic in a
small network. There is no second derivative; the reference has one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlv2v.kernels import driver
from rlv2v.kernels.autograd import register_autograd
from rlv2v.kernels.dispatch import recurrence
from rlv2v.kernels.driver import Operands, Outputs, Problem, Recurrence
from rlv2v.kernels.layout import (
    channels_last,
    dense,
    dense_or_none,
    empty_frames,
    gates_dtype,
    like_weight,
    state_dtype,
)

LIBRARY = torch.library.Library("rlv2v", "DEF")
OPERANDS = "Tensor x, Tensor w_x, Tensor w_h, Tensor bias, Tensor? h0, Tensor? c0"
LIBRARY.define(f"convlstm({OPERANDS}, str backend, bool keep_gates) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"convlstm_backward(Tensor? dhs, Tensor? dcs, {OPERANDS}, Tensor hs, Tensor cs, Tensor gates, str backend, "
    "bool[] need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `rlv2v::convlstm`."""
    *tensors, backend, keep_gates = arguments
    operands = Operands(*tensors)
    with no_autocast(operands.x.device.type):
        return forward_by(recurrence(backend, Problem.of(operands.x, operands.w_h)), *tensors, keep_gates)


def forward_by(run: Recurrence, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `rlv2v::convlstm` with a given recurrence; takes its arguments without the backend."""
    *tensors, keep_gates = arguments
    operands = dense_operands(Operands(*tensors))
    hs, cs, gates = run.forward(operands, keep_gates)
    return hs, cs, no_gates(hs) if gates is None else gates


def forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty results of `rlv2v::convlstm`."""
    *tensors, _, keep_gates = arguments
    operands = Operands(*tensors)
    x, shape = operands.x, operands.hs_shape
    gates = empty_frames(x, *operands.gates_shape, dtype=gates_dtype(x.dtype)) if keep_gates else no_gates(x)
    return empty_frames(x, *shape), empty_frames(x, *shape, dtype=state_dtype(x.dtype)), gates


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Run `rlv2v::convlstm_backward`."""
    *tensors, backend, need = arguments
    operands = Operands(*tensors[2:8])
    with no_autocast(operands.x.device.type):
        return backward_by(recurrence(backend, Problem.of(operands.x, operands.w_h)), *tensors, need)


def backward_by(run: Recurrence, *arguments: Any) -> tuple[Tensor, ...]:
    """Run `rlv2v::convlstm_backward` with a given recurrence; takes its arguments without the backend."""
    dhs, dcs, *tensors, need = arguments
    operands, (hs, cs, gates) = dense_operands(Operands(*tensors[:6])), tensors[6:]
    outputs = Outputs(hs, cs, None if gates.dim() == 1 else gates)
    dhs = torch.zeros_like(hs) if dhs is None else dense(dhs)
    gradients = driver.backward(run, operands, outputs, dhs, dense_or_none(dcs), need)
    # The library chooses the layout of a weight's gradient by the shape; the fake can only follow the weights.
    for n in (1, 2, 3):
        gradient = gradients[n]
        gradients[n] = None if gradient is None else like_weight(gradient, tensors[n])
    return tuple(operands.x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    """Return empty gradients of `rlv2v::convlstm_backward`."""
    *tensors, _, need = arguments
    x, *weights = tensors[2:6]
    hs, cs = tensors[8:10]
    groups, _, *state = hs.shape
    gradients = (
        empty_frames(x, *x.shape),
        *(empty_frames(w, *w.shape) if channels_last(w) else w.new_empty(w.shape) for w in weights),
        empty_frames(hs, groups, *state),
        empty_frames(cs, groups, *state),
    )
    return tuple(g if needed else x.new_empty(0) for g, needed in zip(gradients, need, strict=True))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def differentiate(ctx: Any, dhs: Tensor | None, dcs: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    need, saved = list(ctx.needs_input_grad[:6]), ctx.saved_tensors
    if dhs is None and dcs is None:
        return (None,) * 8
    gradients = torch.ops.rlv2v.convlstm_backward(dhs, dcs, *saved, ctx.backend, need)
    return *(g if needed else None for g, needed in zip(gradients, need, strict=True)), None, None


def save_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[-2]


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise ValueError(f"convlstm: backend must be 'reference' for a second derivative, got {ctx.backend!r}")


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast stays active inside an operator, and would change the convolutions' dtype under code with pointers."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def dense_operands(operands: Operands) -> Operands:
    """Return the operands in the layout that recurrences take."""
    x, w_x, w_h, bias, h0, c0 = operands
    return Operands(dense(x), w_x, like_weight(w_h, w_h), bias, dense_or_none(h0), dense_or_none(c0))


def no_gates(x: Tensor) -> Tensor:
    """Return the empty tensor that stands for gates which were not kept: an operator cannot return None."""
    return x.new_empty(0, dtype=gates_dtype(x.dtype))


LIBRARY.impl("convlstm", forward, "CompositeExplicitAutograd")
LIBRARY.impl("convlstm_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlv2v::convlstm", forward_fake, lib=LIBRARY)
torch.library.register_fake("rlv2v::convlstm_backward", backward_fake, lib=LIBRARY)
register_autograd(LIBRARY, "convlstm", differentiate, setup_context)
# Without this, autograd would record what a backend does inside, or miss it where pointers do the work.
register_autograd(LIBRARY, "convlstm_backward", no_second_derivative, save_backend)
