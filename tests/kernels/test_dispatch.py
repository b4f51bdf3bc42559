"""ConvLSTM: which backend "auto" takes, what `explain` says of it, and that a GPU backend that errs is not taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from convlstm_cases import Shape, arguments
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels import BACKENDS, convlstm, dispatch, explain
from rlv2v.kernels.cpu import CpuRecurrence
from rlv2v.kernels.dispatch import Backend, Problem
from rlv2v.kernels.driver import Recurrence
from rlv2v.kernels.eager import EagerRecurrence
from rlv2v.kernels.reference import LIMITS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
SHAPE = Shape(batch=2, steps=3, inputs=2, channels=3, height=4, width=5, kernel=3)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_explain_names_the_choice_and_why_not_the_others(dtype: torch.dtype, groups: int) -> None:
    choice = explain(*arguments(SHAPE._replace(groups=groups), dtype))
    assert choice.backend == ("eager" if dtype == torch.float64 else "cpu")
    assert choice.why
    assert {choice.backend, *choice.others} == set(BACKENDS)
    assert choice.backend not in choice.others
    assert all(choice.others.values())
    first, *others = str(choice).splitlines()
    assert first == f"{choice.backend}: {choice.why}"
    assert {line.split(":")[0] for line in others} == {f"not {name}" for name in choice.others}
    if dtype == torch.float64:
        assert str(dtype) in choice.others["cpu"]


def test_auto_is_what_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    class Noted(EagerRecurrence):
        def forward(self, *given: object) -> object:
            ran.append("cpu")
            return super().forward(*given)

    monkeypatch.setitem(dispatch.RUNNERS, "cpu", Backend(Noted(), dispatch.cpu_obstacle))
    convlstm(*arguments(SHAPE, torch.float32))
    assert ran == [explain(*arguments(SHAPE, torch.float32)).backend]
    convlstm(*arguments(SHAPE, torch.float64))
    convlstm(*arguments(SHAPE, torch.float32), backend="eager")
    assert len(ran) == 1


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("recurrence", [EagerRecurrence(), CpuRecurrence()], ids=["eager", "cpu"])
def test_the_self_check_passes_what_is_right(recurrence: Recurrence, dtype: torch.dtype) -> None:
    if dtype == torch.float64:
        assert dispatch.errors(EagerRecurrence(), CPU, dtype, 17, 3) == (0, 0)
        return
    value, gradient = dispatch.errors(recurrence, CPU, dtype, 17, 3)
    assert 0 < value <= LIMITS[dtype].value
    assert 0 < gradient <= LIMITS[dtype].gradient


Parts = tuple[Tensor, Tensor | None, Tensor | None]


class Wrong(EagerRecurrence):
    """The plain recurrence with a change to what the forward or the backward returns."""

    def __init__(self, forward: Callable[[Parts], Parts] = tuple, backward: Callable[[Parts], Parts] = tuple) -> None:
        self.on_forward, self.on_backward = forward, backward

    def forward(self, *given: object, **named: object) -> Parts:
        return self.on_forward(super().forward(*given, **named))

    def backward(self, *given: object, **named: object) -> Parts:
        return self.on_backward(super().backward(*given, **named))


class WrongWhenRecomputed(EagerRecurrence):
    """Takes recomputed pre-activations for gates."""

    def backward(
        self, dhs: Tensor, dcs: Tensor, gates: Tensor, activated: bool, *rest: object, **named: object
    ) -> Parts:
        return super().backward(dhs, dcs, gates, True, *rest, **named)


def broken(_: Parts) -> Parts:
    raise RuntimeError("no kernel image is available")


WRONG = {
    "h": (Wrong(forward=lambda parts: (parts[0] * 1.1, *parts[1:])), "is off by"),
    "h is NaN": (Wrong(forward=lambda parts: (parts[0] * float("nan"), *parts[1:])), "is off by nan"),
    "da": (Wrong(backward=lambda parts: (parts[0] * 1.1, *parts[1:])), "gradients by 1.0e-01"),
    "dh0": (Wrong(backward=lambda parts: (parts[0], -parts[1], parts[2])), "gradients by 2.0e+00"),
    "dc0": (Wrong(backward=lambda parts: (parts[0], parts[1], 0 * parts[2])), "gradients by 1.0e+00"),
    "dc0 is NaN": (Wrong(backward=lambda parts: (parts[0], parts[1], parts[2] * float("nan"))), "gradients by nan"),
    "recomputed gates": (WrongWhenRecomputed(), "is off by"),
    "a crash": (Wrong(forward=broken), "failed: no kernel image is available"),
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Recurrence], None]]:
    """Puts a recurrence in the place of both GPU backends; their check runs on the CPU."""
    errors = dispatch.errors

    def use(recurrence: Recurrence) -> None:
        for name in ("triton", "cuda"):
            monkeypatch.setitem(dispatch.RUNNERS, name, Backend(recurrence, lambda _: None))

    monkeypatch.setattr(dispatch, "errors", lambda run, _, *layer: errors(run, CPU, *layer))
    dispatch.choose.cache_clear()
    dispatch.distrust.cache_clear()
    yield use
    dispatch.choose.cache_clear()
    dispatch.distrust.cache_clear()


def problem(dtype: torch.dtype, width: int = 5) -> Problem:
    return Problem(GPU, dtype, 1, 3, 2, 4, 6, width, 3)


@pytest.mark.parametrize("dtype", list(LIMITS)[1:], ids=str)
def test_a_gpu_backend_that_is_right_is_used(
    dtype: torch.dtype, on_gpu: Callable[[Recurrence], None], caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu(EagerRecurrence())
    assert dispatch.choose(problem(dtype)).backend in ("triton", "cuda")
    assert not caplog.records


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("dtype", list(LIMITS)[1:], ids=str)
def test_a_gpu_backend_that_is_wrong_is_not_used_and_named_once(
    dtype: torch.dtype, case: str, on_gpu: Callable[[Recurrence], None], caplog: pytest.LogCaptureFixture
) -> None:
    recurrence, reason = WRONG[case]
    on_gpu(recurrence)
    with caplog.at_level(logging.WARNING, "rlv2v.kernels"):
        choices = [dispatch.choose(problem(dtype, width)) for width in (5, 6, 5)]
    assert {choice.backend for choice in choices} == {"eager"}
    tried = [name for name in ("triton", "cuda") if any(rule.backend == name for rule in dispatch.TABLE)]
    messages = [record.getMessage() for record in caplog.records]
    assert tried and len(messages) == len(tried)
    for name in tried:
        (message,) = (message for message in messages if f"backend {name!r} is not used" in message)
        assert str(GPU) in message
        assert choices[0].others[name] in message
        assert reason in message


@pytest.mark.parametrize(("dtype", "backend"), [(torch.float32, "cpu"), (torch.bfloat16, "eager")], ids=str)
def test_portable_gates_are_not_chosen_where_they_are_slower(dtype: torch.dtype, backend: str) -> None:
    before = _native.gates_isa()
    dispatch.choose.cache_clear()
    _native.gates_set_isa("portable")
    try:
        assert dispatch.choose(problem(dtype)._replace(device=CPU)).backend == backend
    finally:
        _native.gates_set_isa(before)
        dispatch.choose.cache_clear()
