"""ConvLSTM: which backend "auto" selects, what `explain` says of it, and that a wrong GPU backend is not selected."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from convlstm_cases import BACKEND_DTYPES, DTYPES, Shape, arguments, gradient_limit, value_limit

from rlv2v import _native
from rlv2v.kernels import BACKENDS, convlstm, dispatch, explain
from rlv2v.kernels.cpu import CpuRecurrence
from rlv2v.kernels.driver import BackwardOperands, Operands, Outputs, Problem, Recurrence
from rlv2v.kernels.eager import EagerRecurrence

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SHAPE = Shape(batch=2, steps=3, inputs=2, channels=3, height=4, width=5, kernel=3)
GPU_BACKENDS = ("triton", "cuda")


def test_every_backend_has_its_cases() -> None:
    """The GPU's own backend runs in test_cuda.py."""
    assert {*BACKENDS} == {*BACKEND_DTYPES, "cuda"}


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_explain_names_the_selection_and_why_not_the_others(dtype: torch.dtype, groups: int) -> None:
    selection = explain(*arguments(SHAPE._replace(groups=groups), dtype))
    assert selection.backend == ("eager" if dtype == torch.float64 else "cpu")
    assert selection.why
    assert {selection.backend, *selection.others} == set(BACKENDS)
    assert selection.backend not in selection.others
    assert all(selection.others.values())
    first, *others = str(selection).splitlines()
    assert first == f"{selection.backend}: {selection.why}"
    assert {line.split(":")[0] for line in others} == {f"not {name}" for name in selection.others}
    if dtype == torch.float64:
        assert str(dtype) in selection.others["cpu"]


def replace_recurrence(monkeypatch: pytest.MonkeyPatch, name: str, recurrence: Recurrence, **changes: Any) -> None:
    monkeypatch.setitem(dispatch.TABLE, name, dispatch.TABLE[name]._replace(recurrence=recurrence, **changes))


def test_auto_is_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Noted(CpuRecurrence):
        def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
            calls.append("cpu")
            return super().forward(operands, keep_gates)

    replace_recurrence(monkeypatch, "cpu", Noted())
    convlstm(*arguments(SHAPE, torch.float32))
    assert calls == [explain(*arguments(SHAPE, torch.float32)).backend]
    convlstm(*arguments(SHAPE, torch.float64))
    convlstm(*arguments(SHAPE, torch.float32), backend="eager")
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recurrence", [EagerRecurrence(), CpuRecurrence()], ids=["eager", "cpu"])
def test_the_self_check_passes_what_is_right(recurrence: Recurrence, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        assert dispatch.self_check_errors(EagerRecurrence(), CPU, dtype, 17, 3) == (0, 0)
        return
    value, gradient = dispatch.self_check_errors(recurrence, CPU, dtype, 17, 3)
    assert 0 < value <= value_limit(dtype, 9 * (4 + 17) + 1)
    assert 0 < gradient <= gradient_limit(dtype, 9 * 4 * 17)


class Altered(EagerRecurrence):
    """The eager recurrence with a change to what the forward or the backward takes or returns."""

    def __init__(self, **changes: Callable[[Any], Any]) -> None:
        self.changes = changes

    def unsupported_reason(self, problem: Problem) -> str | None:
        return None

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        return self.changes.get("forward", Outputs._make)(super().forward(operands, keep_gates))

    def backward(self, operands: BackwardOperands) -> Any:
        operands = self.changes.get("operands", BackwardOperands._make)(operands)
        return self.changes.get("backward", tuple)(super().backward(operands))


def broken(_: Outputs) -> Outputs:
    raise RuntimeError("no kernel image is available")


WRONG = {
    "h": (Altered(forward=lambda out: out._replace(hs=out.hs * 1.1)), "is off by"),
    "h is NaN": (Altered(forward=lambda out: out._replace(hs=out.hs * float("nan"))), "is off by nan"),
    "da": (Altered(backward=lambda out: (out[0] * 1.1, *out[1:])), "gradients by 1.0e-01"),
    "dh0": (Altered(backward=lambda out: (out[0], -out[1], out[2])), "gradients by 2.0e+00"),
    "dc0": (Altered(backward=lambda out: (out[0], out[1], 0 * out[2])), "gradients by 1.0e+00"),
    "dc0 is NaN": (Altered(backward=lambda out: (*out[:2], out[2] * float("nan"))), "gradients by nan"),
    "recomputed gates": (Altered(operands=lambda operands: operands._replace(activated=True)), "is off by"),
    "a crash": (Altered(forward=broken), "failed: no kernel image is available"),
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Recurrence], None]]:
    """Return a function that puts a recurrence in the place of both GPU backends; their check runs on the CPU."""
    errors = dispatch.self_check_errors

    def use(recurrence: Recurrence) -> None:
        for name in GPU_BACKENDS:
            replace_recurrence(monkeypatch, name, recurrence, auto=lambda problem: problem.device.type == "cuda")

    monkeypatch.setattr(dispatch, "self_check_errors", lambda run, _, *layer: errors(run, CPU, *layer))
    for cached in (dispatch.select, dispatch.self_check_failure):
        cached.cache_clear()
    yield use
    for cached in (dispatch.select, dispatch.self_check_failure):
        cached.cache_clear()


def problem(dtype: torch.dtype, width: int = 5) -> Problem:
    return Problem(GPU, dtype, 1, 3, 2, 4, 6, width, 3)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_gpu_backend_that_is_right_is_used(
    dtype: torch.dtype, on_gpu: Callable[[Recurrence], None], caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu(Altered())
    assert dispatch.select(problem(dtype)).backend == "triton"
    assert not caplog.records


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_gpu_backend_that_is_wrong_is_not_used_and_named_once(
    dtype: torch.dtype, case: str, on_gpu: Callable[[Recurrence], None], caplog: pytest.LogCaptureFixture
) -> None:
    recurrence, reason = WRONG[case]
    on_gpu(recurrence)
    with caplog.at_level(logging.WARNING, "rlv2v.kernels"):
        selections = [dispatch.select(problem(dtype, width)) for width in (5, 6, 5)]
    assert {selection.backend for selection in selections} == {"eager"}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(GPU_BACKENDS)
    for name in GPU_BACKENDS:
        (message,) = (message for message in messages if f"backend {name!r} is not used" in message)
        assert str(GPU) in message
        assert selections[0].others[name] in message
        assert reason in message


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "cpu"), (torch.bfloat16, "eager")], ids=str)
def test_portable_gates_are_not_selected_where_they_are_slower(dtype: torch.dtype, backend: str) -> None:
    usual = _native.isa()
    dispatch.select.cache_clear()
    _native.set_isa("portable")
    try:
        assert dispatch.select(problem(dtype)._replace(device=CPU)).backend == backend
    finally:
        _native.set_isa(usual)
        dispatch.select.cache_clear()
