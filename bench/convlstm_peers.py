"""The forms that bench/convlstm.py times: a ConvLSTM layer as users write it, and ours.

    eager             cat x and h, one convolution, chunk, a step: what public ConvLSTM repositories do
    ... batched       the convolution of x once over all T, a smaller one of h a step, none for the zero state
    ... channels-last the same in memory T,B,H,W,C, weights channels-last
    ... fused cell    the same with aten's `_thnn_fused_lstm_cell` for the gates (GPU)
    compile           torch.compile of a form, T unrolled, static shapes; `max-autotune` with CUDA graphs
    autocast          bfloat16 autocast around a form with float32 weights; compiled together with it
All take x (B,T,C_in,H,W) without a state and return all hidden states. `frame-major`: x and the result's gradient are
dense in the order T,B,H,W,C and weights channels-last, as in our layers; otherwise they are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from convlstm_layer import Form, Run, all_last, cell_order, frame_major, joined, weights_last
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels import convlstm

F32, BF16 = torch.float32, torch.bfloat16
Function = TypeVar("Function", bound=Callable[..., Any])


def pointwise(a: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `h, c` of the next step from pre-activations (N,4C,H,W)."""
    i, f, o, g = a.chunk(4, 1)
    new = torch.sigmoid(i) * torch.tanh(g)
    c = new if c is None else torch.sigmoid(f) * c + new
    return torch.sigmoid(o) * torch.tanh(c), c


def aten_cell(a: Tensor, a_h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `h, c` by aten's LSTM cell, pixels as rows: channels-last frames, gates i, f, g, o."""
    batch, width4, *size = a.shape
    rows = a.permute(0, 2, 3, 1).reshape(-1, width4)
    hidden = torch.zeros_like(rows) if a_h is None else a_h.permute(0, 2, 3, 1).reshape(-1, width4)
    c_prev = rows.new_zeros(len(rows), width4 // 4) if c is None else c.permute(0, 2, 3, 1).reshape(len(rows), -1)
    outcome = torch.ops.aten._thnn_fused_lstm_cell(rows, hidden, c_prev)
    h, c_next = (state.view(batch, *size, width4 // 4).permute(0, 3, 1, 2) for state in outcome[:2])
    return h, c_next


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return all h of Shi et al. 2015, eq. 3 without peepholes, from a zero state."""
    channels, padding = weight.shape[0] // 4, weight.shape[-1] // 2
    h = c = x.new_zeros(x.shape[0], channels, *x.shape[-2:])
    hs = []
    for x_t in x.unbind(1):
        h, c = pointwise(conv2d(torch.cat((x_t, h), 1), weight, bias, padding=padding), c)
        hs.append(h)
    return torch.stack(hs, 1)


def steps_of(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, fused: bool = False) -> list[Tensor]:
    """Return all hidden states (B,C,H,W); x is convolved once over all T."""
    padding = w_x.shape[-1] // 2
    a = conv2d(x.transpose(0, 1).flatten(0, 1), w_x, bias, padding=padding)
    h: Tensor | None = None
    c: Tensor | None = None
    hs = list[Tensor]()
    for a_t in a.unflatten(0, (x.shape[1], x.shape[0])).unbind(0):
        a_h = None if h is None else conv2d(h, w_h, padding=padding)
        h, c = aten_cell(a_t, a_h, c) if fused else pointwise(a_t if a_h is None else a_t + a_h, c)
        hs.append(h)
    return hs


def batched(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor) -> Tensor:
    """Stack the steps in torch's own layout."""
    return torch.stack(steps_of(x, w_x, w_h, bias), 1)


def channels_last(x: Tensor, w_x: Tensor, w_h: Tensor, bias: Tensor, fused: bool = False) -> Tensor:
    """Run `batched` in memory T,B,H,W,C: at most one copy of x, and hs is a view of such memory."""
    hs = steps_of(frame_major(x), w_x, w_h, bias, fused)
    return torch.stack([h.permute(0, 2, 3, 1) for h in hs]).permute(1, 0, 4, 2, 3)


def autocast(run: Run) -> Run:
    """Return `run` under bfloat16 autocast on the CPU."""

    def under_autocast(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return run(*leaves)

    return under_autocast


def compiled(run: Function, mode: str | None = None) -> Function:
    """Return `run` compiled for the shape that it meets; it raises if a part would run uncompiled."""
    return cast(Function, torch.compile(run, dynamic=False, fullgraph=True, mode=mode))


def mine(backend: str, dtype: torch.dtype, kind: str = "") -> Form:
    """Return a form of ours; kind: any of "frame-major", "recompute" and "autocast"."""

    def run(*leaves: Tensor) -> Tensor:
        return convlstm(*leaves, backend=backend, recompute="recompute" in kind)[0]

    return Form(
        f"{'eager backend' if backend == 'eager' else backend} {kind}".strip(),
        dtype,
        autocast(run) if "autocast" in kind else run,
        leaves=F32 if "autocast" in kind else None,
        lay=(all_last,) if "frame-major" in kind else (),
        training_only="recompute" in kind,
        backend=backend,
    )


PEERS: dict[str, tuple[Run, tuple[Callable[..., Any], ...]]] = {
    "": (eager, (joined,)),
    " batched": (batched, ()),
    " channels-last": (channels_last, (weights_last,)),
}


def peers(name: str, dtype: torch.dtype, wrap: Callable[[Run], Run], kinds: Iterable[str], **fields: Any) -> list[Form]:
    """Return the wrapped peers of some kinds."""
    return [Form(f"{name}{kind}", dtype, wrap(PEERS[kind][0]), PEERS[kind][1], **fields) for kind in kinds]


def cpu_forms(*, quick: bool) -> list[Form]:
    """Return all forms for the CPU, each dtype with its own eager and compiled peers.

    quick: without the compiled ones, which take minutes, and without our eager backend.
    """
    forms, best = list[Form](), ("", " channels-last")
    for dtype in (F32, BF16):
        forms += peers("eager", dtype, lambda run: run, PEERS)
        forms += [mine("cpu", dtype, kind) for kind in ("", "frame-major", "recompute")]
        if not quick:
            forms += [*peers("compile", dtype, compiled, PEERS, group="compiled"), mine("eager", dtype)]
    forms += [*peers("autocast", BF16, autocast, best, leaves=F32), mine("cpu", BF16, "autocast")]
    if not quick:
        name = "autocast+compile"
        forms += peers(name, BF16, lambda run: compiled(autocast(run)), best, leaves=F32, group=name)
    return forms


def cuda_forms(dtype: torch.dtype, *, quick: bool) -> list[Form]:
    """Return all forms of one dtype for a GPU; quick: without the compiled ones."""
    forms = [
        *peers("eager", dtype, lambda run: run, PEERS),
        Form("eager fused cell", dtype, partial(channels_last, fused=True), (weights_last, cell_order)),
        *(mine("triton", dtype, kind) for kind in ("", "frame-major", "recompute")),
        *(mine("cuda", dtype, kind) for kind in ("", "frame-major")),
        mine("eager", dtype),
    ]
    if not quick:
        tune, best = "max-autotune", ("", " channels-last")
        forms += peers("compile", dtype, compiled, best, group="compiled")
        forms += peers(tune, dtype, lambda run: compiled(run, tune), best, graphs=True, group="compiled")
    return forms


def network_forms(dtype: torch.dtype, backends: Iterable[str]) -> list[Form]:
    """Return the forms of several networks: eager in a call each, backends of ours so and in one call for all."""
    forms = peers("eager", dtype, lambda run: run, [""], separate=True)
    for backend in backends:
        form = mine(backend, dtype, "frame-major")
        forms += [replace(form, name=f"{backend} calls", separate=True), replace(form, name=f"{backend} grouped")]
    return forms
