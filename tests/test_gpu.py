"""What only a GPU can show of training: no host waits in a step, graphs change no number, precisions, out of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlv2v.algorithm import Algorithm
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError
from rlv2v.objective import Clips
from rlv2v.store import Checkpoints
from rlv2v.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = {"replicas": 1, "rl_every": 1, "steps": 60, "replay_alpha": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    return out


def clips_of(config: Config, seed: int) -> Clips:
    rng = torch.Generator().manual_seed(seed)

    def noise(num: int, frames: int) -> torch.Tensor:
        return (torch.rand(num, frames, 3, config.size, config.size, generator=rng) * 2 - 1).cuda()

    x, y, z = (noise(num, config.frames) for num in (config.batch_x, config.batch_y, config.batch_z))
    return Clips(x, y, z, noise(config.batch_s, 1))


def run(config: Config, steps: int) -> tuple[list[dict[str, float]], Algorithm]:
    algorithm = Algorithm(config, torch.device("cuda"))
    algorithm.start()
    told = []
    for step in range(steps):
        values = algorithm.step(clips_of(config, step))
        values |= algorithm.advance(float(step + 1), values.pop("distance"))
        told.append({name: value.item() for name, value in values.items()})
    return told, algorithm


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(precision: str) -> None:
    config = Config.of("tiny", precision=precision, **SMALL).check()
    algorithm = Algorithm(config, torch.device("cuda"))
    algorithm.start()
    clips = [clips_of(config, step) for step in range(8)]
    for step in range(2):  # kernels are compiled and checked, memory is taken
        told = algorithm.step(clips[step])
        algorithm.advance(float(step), told["distance"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 8):
            told = algorithm.step(clips[step])
            algorithm.advance(float(step), told["distance"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_change_no_number(precision: str) -> None:
    torch.backends.cudnn.deterministic = True
    runs = []
    for graphs in (False, True):
        config = Config.of("tiny", precision=precision, graphs=graphs, **SMALL).check()
        runs.append(run(config, 12)[0])
    torch.backends.cudnn.deterministic = False
    for plain, recorded in zip(*runs, strict=True):
        assert recorded == pytest.approx(plain, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_trains_and_resumes(data: Path, tmp_path: Path, precision: str, graphs: bool) -> None:
    def config(**changes: object) -> Config:
        return Config.of("tiny", data=data, out=tmp_path / "run", precision=precision, graphs=graphs, **changes)

    train(config(steps=12))
    train(config(steps=16, resume=True))
    assert Checkpoints(tmp_path / "run", keep=1, num_replicas=1).newest() == 16


def test_out_of_memory_is_advice(data: Path, tmp_path: Path) -> None:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / whole)
    try:
        with pytest.raises(UserError, match=r"out of memory.*--memory"):
            train(Config.of("tiny", data=data, out=tmp_path / "run", size=512, frames=4, batch_x=64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
