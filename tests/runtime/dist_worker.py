"""One rank of test_distributed.py: it leaves the results of every case in `OUT/<rank>.pt`; then the last rank dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rlv2v.errors import UserError
from rlv2v.method.patches import draw, patch_gaps
from rlv2v.model.norm import SequenceNorm, stats_over
from rlv2v.runtime import distributed as dist

PER_RANK = 2


def inputs(num_ranks: int) -> dict[str, Tensor]:
    """Return the clips of all ranks, in order; they are the same in every process."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_ranks * PER_RANK, *shape, generator=rng, dtype=torch.float64)

    return {"x": normal(3, 4, 8, 8), "a": normal(3, 3, 8, 8), "b": normal(3, 3, 8, 8), "g": normal(3, 4, 8, 8)}


def share(values: Tensor, rank: int) -> Tensor:
    return values[rank * PER_RANK : (rank + 1) * PER_RANK].clone()


def normalise(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Run a batch normalisation over all ranks and with local statistics; return its gradients of mean(weights * y)."""
    norm = SequenceNorm(4, "batch").double()
    x = x.requires_grad_()
    y, _ = norm(x)
    (weights * y).mean().backward()
    with stats_over("rank", norm), torch.no_grad():
        alone, _ = norm(x * 3 + 1)
    assert x.grad is not None and norm.weight.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "alone": alone}


def patches(a: Tensor, b: Tensor, num_ranks: int, ranks: range) -> dict[str, Tensor]:
    """Return the distance of the patches of some ranks' clips, and its gradient; a replica a rank."""
    draws, a = draw(np.random.default_rng(0), num_ranks, ranks, torch.device("cpu")), a.requires_grad_()
    (gap,) = patch_gaps([((a,), (b,))], draws)
    gap.backward()
    assert a.grad is not None
    return {"gap": gap.detach(), "da": a.grad}


class Net(nn.Module):
    """Weights of unequal size, used in another order than they are listed in; one of them is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (300, 7, 200, 1, 400, 30)
        self.weights = nn.ParameterList(nn.Parameter(torch.full((n, 300), 1e-4 * (k + 1))) for k, n in enumerate(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for k in (3, 0, 5, 2, 4):
            x = x + (x @ self.weights[k].T).tanh().mean() * 0.1
        return x.square().mean()


def reduce(net: Net, x: Tensor, passes: int) -> tuple[list[Tensor | None], list[tuple[int, int]], int]:
    """Return gradients after some passes, each averaged over the ranks; all-reduces of each pass, before and after
    `finish` was called; and those of a pass after `close`."""
    sent: list[Tensor] = []
    all_reduce = dist.dist.all_reduce

    def counted(tensor: Tensor, *args: object, **options: object) -> object:
        sent.append(tensor)
        return all_reduce(tensor, *args, **options)

    dist.dist.all_reduce = counted
    reducer, counts = dist.Reducer(list(net.parameters())), []
    for _ in range(passes):
        net.zero_grad(set_to_none=True)
        sent.clear()
        with reducer:
            net(x).backward()
        early = len(sent)
        reducer.finish()
        counts.append((early, len(sent)))
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    reducer.close()
    sent.clear()
    with reducer:
        net(x).backward()
    dist.dist.all_reduce = all_reduce
    return grads, counts, len(sent)


def main(out: Path) -> None:
    world = dist.connect("cpu")
    clips = inputs(world.size)
    results: dict[str, object] = {}
    x, g = (share(clips[name], world.rank) for name in "xg")
    results["norm"] = normalise(x, g)
    own = range(world.rank, world.rank + 1)
    results["patches"] = patches(share(clips["a"], world.rank), share(clips["b"], world.rank), world.size, own)
    results["grads"], results["counts"], results["closed"] = reduce(Net(), torch.full((300,), world.rank + 1.0), 3)

    agreed = []
    for step in range(4):  # rank 1 wants to stop at step 2; rank 0's clock and wish to save count, no other's
        control = dist.StepControl(
            world.rank == 1 and step == 2, 10.0 * step + world.rank, step == 1 or world.rank == 1
        )
        agreed.append(tuple(world.all_agree(control)))
    results["agreed"], results["last"] = agreed, tuple(world.flush())
    results["shared"] = world.broadcast_object(lambda: f"rank {world.rank}")
    net = nn.Linear(3, 3)
    nn.init.constant_(net.weight, world.rank)
    world.broadcast_parameters(net)
    results["weights"] = net.weight.detach()
    world.barrier()
    if world.rank < world.size - 1:
        try:
            while True:
                world.all_agree(dist.StepControl(False, 0.0, False))
        except UserError as error:
            results["lost"] = str(error)
    torch.save(results, out / f"{world.rank}.pt")
    os._exit(0)  # as a killed rank, without leaving the others


if __name__ == "__main__":
    main(Path(sys.argv[1]))
