"""Sorted rows are torch's, and gradients go where the numbers came from."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from rlv2v.kernels.sorting import sort_rows

SHAPES = [(3, 1000), (2, 4, 37), (1, 1), (5,), (0, 7), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_are_sorted_as_torch_sorts_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.numel() > 20:
        x.view(-1)[[2, 5, 9]] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
        x.view(-1)[11] = x.view(-1)[12]
    strided = x if x.dim() == 1 else x.transpose(-1, -2).contiguous().transpose(-1, -2)
    for given in (x, strided, x.clone().requires_grad_()):
        torch.testing.assert_close(sort_rows(given).detach(), x.sort(-1).values, rtol=0, atol=0, equal_nan=True)


def test_gradients_go_where_the_numbers_came_from() -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 500, generator=rng, requires_grad=True)  # no two alike
    weights = torch.randn(3, 500, generator=rng)
    (ours,) = torch.autograd.grad((sort_rows(x) * weights).sum(), x)
    (right,) = torch.autograd.grad((x.sort(-1).values * weights).sum(), x)
    assert torch.equal(ours, right)
    flat = torch.zeros(2, 8, requires_grad=True)
    (among_equals,) = torch.autograd.grad((sort_rows(flat) * weights[:2, :8]).sum(), flat)
    torch.testing.assert_close(among_equals.sum(-1), weights[:2, :8].sum(-1))


def test_torchs_own_checks() -> None:
    x = torch.randn(3, 20)
    opcheck(torch.ops.rlv2v.sort_rows, (x.clone().requires_grad_(), True))
    opcheck(torch.ops.rlv2v.sort_rows, (x, False))
    compiled = torch.compile(sort_rows, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x.sort(-1).values)
