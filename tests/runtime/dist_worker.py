"""One rank of tests/test_dist.py: runs every case and leaves what it found in `OUT/<rank>.pt`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from rlv2v.method.terms import domain_gap, gap_floor
from rlv2v.model.norm import SequenceNorm, local_stats
from rlv2v.runtime import distributed as dist

PER_RANK = 2


def inputs(num_ranks: int) -> dict[str, Tensor]:
    """What the ranks share, alike in every process: clips of all ranks, in order."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_ranks * PER_RANK, *shape, generator=rng, dtype=torch.float64)

    return {"x": normal(3, 4, 8, 8), "a": normal(3, 3, 8, 8), "b": normal(3, 3, 8, 8), "g": normal(3, 4, 8, 8)}


def share(values: Tensor, rank: int) -> Tensor:
    return values[rank * PER_RANK : (rank + 1) * PER_RANK].clone()


def normalise(x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Two runs of a batch normalisation, the second apart; its gradients of mean(weights * y)."""
    norm = SequenceNorm(4, "batch").double()
    x = x.requires_grad_()
    y, _ = norm(x)
    (weights * y).mean().backward()
    with local_stats(norm), torch.no_grad():
        alone, _ = norm(x * 3 + 1)
    assert x.grad is not None and norm.weight.grad is not None
    return {
        "y": y.detach(), "dx": x.grad, "dw": norm.weight.grad, "alone": alone,
        "mean": norm.running_mean, "square": norm.running_square,
    }  # fmt: skip


def gaps(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    directions = torch.eye(3, dtype=torch.float64)
    a = a.requires_grad_()
    gap = domain_gap(a, b, directions)
    gap.backward()
    assert a.grad is not None
    return {"gap": gap.detach(), "da": a.grad, "floor": gap_floor([a.detach(), b], len(a), directions)}


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


def reduce(net: Net, x: Tensor, passes: int) -> tuple[list[Tensor | None], list[int]]:
    """Gradients after some passes, each averaged over the ranks; how many buckets had gone before each was finished."""
    reducer, early = dist.Reducer(list(net.parameters())), []
    for _ in range(passes):
        net.zero_grad(set_to_none=True)
        with reducer:
            net(x).backward()
        early.append(len(reducer._sent))
        reducer.finish()
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    reducer.close()
    with reducer:
        net(x).backward()
    assert not reducer._sent, "without hooks nothing is sent"
    return grads, [*early, len(reducer._buckets)]


def main(out: Path) -> None:
    world = dist.connect("cpu")
    given = inputs(world.size)
    found: dict[str, object] = {}
    x, g = (share(given[name], world.rank) for name in "xg")
    found["norm"] = normalise(x, g)
    found["gaps"] = gaps(share(given["a"], world.rank), share(given["b"], world.rank))
    found["grads"], found["early"] = reduce(Net(), torch.full((300,), float(world.rank + 1)), 3)

    control = []
    for step in range(4):  # rank 1 wants to stop at step 2; rank 0's clock and wish to save count, no other's
        said = dist.StepControl(world.rank == 1 and step == 2, 10.0 * step + world.rank, step == 1 or world.rank == 1)
        control.append(tuple(world.all_agree(said)))
    found["control"], found["last"] = control, tuple(world.flush())
    found["shared"] = world.broadcast_object(lambda: f"rank {world.rank}")
    path = out / "by-first"
    found["in turn"] = world.rank0_first(lambda: path.write_text("x") if world.first else path.read_text())
    net = nn.Linear(3, 3)
    nn.init.constant_(net.weight, world.rank)
    world.broadcast_parameters(net)
    found["weights"] = net.weight.detach()
    torch.save(found, out / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
