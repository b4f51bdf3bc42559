"""Constants that are made once: the same tensor for the same arguments, and none that belongs to something else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlv2v.runtime import constants
from rlv2v.runtime.constants import constant, made_anew


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "_known", {})


def ramp(start: int, end: int, like: Tensor) -> Tensor:
    return torch.arange(start, end, dtype=like.dtype, device=like.device)


def other(start: int, end: int, like: Tensor) -> Tensor:
    return -ramp(start, end, like)


def test_a_constant_is_made_once_for_its_arguments_dtype_and_maker() -> None:
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    first = constant(ramp, 2, 5, like=single)
    assert first.tolist() == [2, 3, 4] and constant(ramp, 2, 5, like=torch.ones(7, 7)) is first
    assert constant(ramp, 2, 6, like=single) is not first and constant(other, 2, 5, like=single).tolist() == [
        -2,
        -3,
        -4,
    ]
    assert constant(ramp, 2, 5, like=double).dtype == torch.float64


def test_what_inference_makes_may_be_saved_for_a_gradient() -> None:
    with torch.inference_mode():
        made = constant(ramp, 0, 3, like=torch.zeros(1))
    weights = torch.ones(3, requires_grad=True)
    (constant(ramp, 0, 3, like=weights) * weights).sum().backward()
    assert (
        constant(ramp, 0, 3, like=weights) is made and weights.grad is not None and weights.grad.tolist() == [0, 1, 2]
    )


def test_a_traced_tensor_neither_leaves_nor_gets_a_constant() -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(1))
        assert isinstance(constant(ramp, 0, 3, like=fake), type(fake))
    assert not constants._known
    constant(ramp, 0, 3, like=torch.zeros(1))
    with mode:
        assert isinstance(constant(ramp, 0, 3, like=fake), type(fake))


def test_a_count_makes_them_anew_and_no_more_are_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    like = torch.zeros(1)
    first = constant(ramp, 0, 3, like=like)
    with made_anew():
        assert constant(ramp, 0, 3, like=like) is not first
    assert constant(ramp, 0, 3, like=like) is first
    monkeypatch.setattr(constants, "MAX_KNOWN", 1)
    assert constant(ramp, 0, 4, like=like) is not constant(ramp, 0, 4, like=like)
    assert constant(ramp, 0, 3, like=like) is first, "a recording may point at it"
