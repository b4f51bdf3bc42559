"""The warm-up: G learns to reconstruct and P to predict, and both domains get the same networks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data.index import open_dataset
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.method.clips import Clips, batch_sizes, make_loader
from rlv2v.method.pretrain import warm_up
from rlv2v.model.build import Nets, build_nets
from rlv2v.runtime.distributed import World

WORLD = World(torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=8, y=4, z=4, s=4, val=2, test=2))
    return out


def config_of(data: Path, **changes: object) -> Config:
    return Config.of("tiny", data=data, replicas=1, **changes).check()


def clips_of(config: Config) -> Clips:
    loader = make_loader(config, open_dataset(config.data.folder, frames=4), WORLD)
    try:
        return Clips.of(next(loader), WORLD.device)
    finally:
        loader.close()


def warmed_up(config: Config, stop: Callable[[], bool] = lambda: False) -> tuple[Nets, Nets, bool]:
    """Return the networks of a config's seed, the same ones after the warm-up, and what it returned."""
    nets = []
    for _ in range(2):
        torch.manual_seed(config.seed)
        nets.append(build_nets(config))
    done = warm_up(nets[1], open_dataset(config.data.folder, frames=4), config, WORLD, stop)
    return nets[0], nets[1], done


@torch.no_grad()
def errors(nets: Nets, clips: Clips) -> tuple[float, float]:
    """Return the mean absolute errors of G's reconstruction, with its copy mask shut, and of P's prediction."""
    videos: Tensor = torch.cat((clips.x, clips.yz))
    nets.g_x.mask_gain.zero_()
    reconstruction = (nets.g_x(videos)[0] - videos).abs().mean()
    prediction = (nets.p_x(videos)[0][:, :-1] - videos[:, 1:]).abs().mean()
    return reconstruction.item(), prediction.item()


def test_the_warm_up_makes_g_reconstruct_and_p_predict_in_both_domains(data: Path) -> None:
    ratios = []
    for seed in range(3):
        config = config_of(data, warmup_steps=15, warmup_lr=1e-2, seed=seed, head="mask")
        cold, warm, done = warmed_up(config)
        clips = clips_of(config)
        ratios.append([w / c for w, c in zip(errors(warm, clips), errors(cold, clips), strict=True)])
        assert done
        for ours, theirs in ((warm.g_x, warm.g_y), (warm.p_x, warm.p_y)):
            mine, other = ours.state_dict(), theirs.state_dict()
            mine.pop("mask_gain"), other.pop("mask_gain")
            assert all(torch.equal(mine[key], other[key]) for key in mine)
    reconstruction, prediction = (statistics.median(ratio) for ratio in zip(*ratios, strict=True))
    assert reconstruction < 0.3 and prediction < 0.75, ratios


def test_a_stop_ends_the_warm_up_after_its_step(data: Path) -> None:
    calls: list[int] = []
    _, _, done = warmed_up(config_of(data, warmup_steps=50), stop=lambda: bool(calls.append(1)) or len(calls) == 2)
    assert not done and len(calls) == 2


def test_without_warm_up_steps_the_domains_keep_networks_of_their_own(data: Path) -> None:
    cold, warm, done = warmed_up(config_of(data, warmup_steps=0))
    assert done and not torch.equal(warm.g_x.last.w_x, warm.g_y.last.w_x)
    assert torch.equal(cold.g_x.last.w_x, warm.g_x.last.w_x)


def test_a_step_takes_twice_as_many_clips_of_y_where_there_is_no_z() -> None:
    config = Config.of("tiny", batch_x=2, batch_y=3, batch_z=4, batch_s=5)
    config = config.replace(patches=0.0)
    assert batch_sizes(config, 2, has_z=True) == {"x": 4, "y": 6, "z": 8, "s": 10}
    assert batch_sizes(config, 2, has_z=False) == {"x": 4, "y": 12, "z": 8, "s": 10}
