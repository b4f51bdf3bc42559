"""A block in float32, which runs by the operators, is the same block in float64, which runs by their definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlv2v.kernels import norm_ops
from rlv2v.model import RPB, URB
from rlv2v.model.norm import SequenceNorm, stats_over

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, C = 2, 3, 5


def block_of(name: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    block = RPB(C, 6, kind) if name == "RPB" else URB(C, 4, 6, kind)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block


def outcome(block: nn.Module, frames: list[Tensor]) -> list[Tensor]:
    """Return outputs, states and gradients of a run from the start, one from its state, and one step from each."""
    leaves = [x.clone().requires_grad_() for x in frames]

    def run(clip: slice, state: object = None, **mode: bool) -> tuple[Tensor, ...]:
        *outs, state = block(*(x[:, clip] for x in leaves), state, **mode)
        return *outs, state

    *first, state = run(slice(2))
    *rest, last = run(slice(2, None), state)
    *whole, states = run(slice(None), all_states=True)
    *steps, _ = run(slice(None), states, one_step_from_each=True)
    outs = [*first, *rest, *whole, *steps, *tree_leaves((last, states))]
    outs = [out for out in outs if out is not None]  # a block without a normalisation has no moments
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=rng, dtype=torch.float64) for out in outs]
    loss = torch.stack([(out.double() * w).sum() for out, w in zip(outs, weights, strict=True)]).sum()
    return outs + list(torch.autograd.grad(loss, [*leaves, *block.parameters()]))


@pytest.mark.parametrize("kind", ["clip", "batch", "none"])
@pytest.mark.parametrize("name", ["RPB", "URB"])
def test_a_block_in_float32_is_the_block_in_float64(name: str, kind: str) -> None:
    block = block_of(name, kind)
    rng = torch.Generator().manual_seed(2)
    shapes = [(B, T, C, 6, 8)] if name == "RPB" else [(B, T, C, 3, 4), (B, T, 4, 6, 8)]
    frames = [torch.randn(shape, generator=rng) for shape in shapes]
    ours = outcome(block, frames)
    right = outcome(copy.deepcopy(block).double(), [x.double() for x in frames])
    for one, other in zip(ours, right, strict=True):
        assert (one.double() - other).norm() <= 5e-6 * (other.norm() + 1)


def test_a_block_of_the_training_runs_by_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = norm_ops.run
    monkeypatch.setattr(norm_ops, "run", lambda *args: calls.append(args[:2]) or run(*args))
    block, x = block_of("RPB", "clip"), torch.randn(B, T, C, 6, 8, requires_grad=True)
    block(x)[0].sum().backward()
    assert calls == [("cpu", "forward"), ("cpu", "backward")]


def test_over_the_clips_of_a_batch_the_operator_makes_the_moments() -> None:
    """Kind "batch" in float32, in training and over each clip."""
    norm = SequenceNorm(C, "batch")
    x = torch.randn(3, T, C, 4, 4)
    together = norm(x)[0]
    means = x.double().mean((0, 3, 4)).cumsum(0) / torch.arange(1, T + 1)[:, None]
    squares = x.double().square().mean((0, 3, 4)).cumsum(0) / torch.arange(1, T + 1)[:, None]
    want = (x - means[..., None, None]) / (squares - means.square() + norm.eps).sqrt()[..., None, None]
    torch.testing.assert_close(together.double(), want, rtol=1e-5, atol=1e-5)
    with stats_over("clip", norm):
        apart = norm(x)[0]
    assert torch.equal(apart, torch.cat([norm.eval()(clip[None])[0] for clip in x]))
