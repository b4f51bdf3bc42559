"""A GPU backend's recurrence alone, from the pre-activations of x to da, beside the textbook in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from convlstm_cases import STATES, gradient_limit, literal_recurrence, value_limit
from torch import Tensor

from rlv2v.kernels.driver import BackwardOperands
from rlv2v.kernels.layout import dense_or_none

Named = dict[str, Tensor | None]
ShapeOfSteps = tuple[int, int, int, int, int, int, int]  # G, T, B, C, H, W, k


def recurrence_inputs(shape: ShapeOfSteps, dtype: torch.dtype, *, state: str) -> Named:
    """Return float64 tensors whose numbers are those of the dtypes that a backend takes; state: of `STATES`."""
    groups, steps, batch, c, height, width, k = shape
    rng = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=rng, dtype=torch.float64) * scale).to(dtype).double()

    frames, first = (groups, steps, batch, c, height, width), (groups, batch, c, height, width)
    return {
        "a": normal(groups, steps, batch, 4 * c, height, width),
        "w_h": normal(groups, 4 * c, c, k, k, scale=(c * k * k) ** -0.5),
        "h0": normal(*first) if "h0" in STATES[state] else None,
        "c0": normal(*first, dtype=torch.float32) if "c0" in STATES[state] else None,
        "dhs": normal(*frames),
        "dcs": normal(*frames, dtype=torch.float32),
    }


def run_recurrence(
    backend: Any,
    inputs: Named,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_dcs: bool,
    activated: bool,
    copy: Callable[[Tensor | None], Tensor | None] = dense_or_none,
) -> Named:
    """Run forward and backward; if the backward takes pre-activations, they are the exact ones, rounded.

    copy: brings frames into the backends' layout.
    """
    cast = {
        name: None if a is None else a.to(device, torch.float32 if name in ("c0", "dcs") else dtype)
        for name, a in inputs.items()
    }
    w_h = cast.pop("w_h")
    a, h0, c0, dhs, dcs = (copy(cast[name]) for name in ("a", "h0", "c0", "dhs", "dcs"))
    hs, cs, gates = backend.recur(a, w_h, h0, c0, activated)
    saved = gates
    if not activated:
        assert gates is None
        pre_activations = literal_recurrence(inputs["a"], inputs["w_h"], inputs["h0"], inputs["c0"])[3]
        saved = copy(pre_activations.to(device, dtype))
    need_state = h0 is not None or c0 is not None
    operands = BackwardOperands(dhs, dcs if with_dcs else None, saved, activated, cs, c0, w_h, need_state)
    da, dh0, dc0 = backend.backward(operands)
    assert (dh0 is None, dc0 is None) == (not need_state, not need_state)
    return {"hs": hs, "cs": cs, "gates": gates, "da": da, "dh0": dh0, "dc0": dc0}


def check_recurrence(
    backend: Any, shape: ShapeOfSteps, dtype: torch.dtype, device: torch.device, *, state: str, **options: Any
) -> None:
    """Assert shape, dtype and limits of all six outputs; options as `run_recurrence`."""
    inputs = recurrence_inputs(shape, dtype, state=state)
    *_, channels, _, _, kernel = shape
    value_terms = kernel**2 * channels + 1
    gradient_terms = 4 * kernel**2 * channels
    leaves = {f"d{name}": inputs[name].requires_grad_() for name in ("a", "h0", "c0") if inputs[name] is not None}
    hs, cs, gates, _ = literal_recurrence(inputs["a"], inputs["w_h"], inputs["h0"], inputs["c0"])
    loss = (hs * inputs["dhs"]).sum() + ((cs * inputs["dcs"]).sum() if options["with_dcs"] else 0)
    exact = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    ours = run_recurrence(
        backend, {name: a if a is None else a.detach() for name, a in inputs.items()}, dtype, device, **options
    )
    gates_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    for name, want, kind in (("hs", hs, dtype), ("cs", cs, torch.float32), ("gates", gates, gates_dtype)):
        if name == "gates" and not options["activated"]:
            continue
        assert ours[name].dtype == kind and ours[name].shape == want.shape, name
        error = ((ours[name].double().cpu() - want).abs() / want.abs().clamp(min=1)).max()
        assert error <= value_limit(dtype, value_terms), f"{name} is off by {error:.1e}"
    for name, want in exact.items():
        assert ours[name].dtype == (torch.float32 if name == "dc0" else dtype) and ours[name].shape == want.shape, name
        error = (ours[name].double().cpu() - want).norm() / want.norm()
        assert error <= gradient_limit(dtype, gradient_terms), f"{name} is off by {error:.1e}"
