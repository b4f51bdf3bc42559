"""A step of Algorithm 1 as a whole: its start and its turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_cases import random_clips
from torch import Tensor, nn

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.method.step import Algorithm
from rlv2v.train import train

CPU = torch.device("cpu")
TINY = {"replicas": 1, "size": 8, "widths": (4,), "disc_widths": (4, 4), "steps": 40}
pytestmark = pytest.mark.usefixtures("one_thread")


def started(preset: str = "tiny", **changes: object) -> Algorithm:
    algorithm = Algorithm(Config.of(preset, **TINY | changes).check(), CPU)
    algorithm.start()
    return algorithm


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def same(net: nn.Module, old: list[Tensor]) -> bool:
    return all(torch.equal(new, was) for new, was in zip(net.parameters(), old, strict=True))


def test_the_domains_take_turns_and_only_their_networks_move() -> None:
    algorithm = started(rl_every=2, weight_decay=0.0)
    clips = random_clips(dtype=torch.float32)
    for turn in ("x", None, "y", None, "x"):
        nets = {name: weights(net) for name, net in algorithm.nets.named_children()}
        targets = {name: weights(net) for name, net in algorithm.targets.named_children()}
        logs = algorithm.step(clips)
        algorithm.advance(0.0)
        assert (f"loss_q_{turn}" in logs) == (f"actor_{turn}" in logs) == (turn is not None)
        moved = {name for name, net in algorithm.nets.named_children() if not same(net, nets[name])}
        assert moved == {"g_x", "g_y", "p_x", "p_y", "d_x", "d_y"} | ({f"q_{turn}"} if turn else set())
        tau = algorithm.config.rl.tau
        for name, net in algorithm.targets.named_children():
            follows = turn is not None and name in ("g_x", "g_y", "p_x", "p_y", f"q_{turn}")
            for new, old, live in zip(
                net.parameters(), targets[name], getattr(algorithm.nets, name).parameters(), strict=True
            ):
                torch.testing.assert_close(new, torch.lerp(old, live, tau) if follows else old)


@pytest.mark.parametrize(("mask_prior", "gain"), [(2.0, 0.25), (0.0, 0.0)])
def test_the_ramp_opens_the_copy_mask_where_the_mask_has_a_prior(mask_prior: float, gain: float) -> None:
    algorithm = started("paint", mask_prior=mask_prior)
    algorithm.schedule.ramp.fill_(0.25)
    algorithm.step(random_clips(dtype=torch.float32))
    assert algorithm.nets.g_x.mask_gain == algorithm.nets.g_y.mask_gain == gain


def test_a_run_starts_from_the_same_networks_in_both_domains(tmp_path: Path) -> None:
    """At step 0, after the warm-up, both domains, the targets and the average hold the same networks."""
    data = tmp_path / "data"
    write_dataset(data, size=16, frames=4, counts=Counts(x=8, y=4, z=4, s=4, val=2, test=2))
    train(Config.of("tiny", data=data, out=tmp_path / "run", steps=1, device="cpu", replicas=1))
    state = Checkpoints(tmp_path / "run", keep=2, num_replicas=1).load(0, "state", CPU)
    nets = state["nets"]
    for key, value in nets.items():
        if key.startswith(("g_x", "p_x")):
            assert torch.equal(value, nets[key.replace("_x", "_y", 1)]), "pre-trained for both domains"
        assert torch.equal(value, state["targets"][key])
        assert key not in state["average"] or torch.equal(value, state["average"][key])
