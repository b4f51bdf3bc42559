"""What only a GPU can show of training: no host waits in a step, graphs change no number, precisions, out of memory."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips
from rlv2v.method.step import Algorithm
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.cuda_graphs import Graphs, Inputs, Phase, Recorder, Recording
from rlv2v.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NUM_PLAIN = 3  # calls of a phase before it is recorded
SMALL = {"replicas": 1, "rl_every": 1, "steps": 60, "replay_alpha": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    return out


def clips_of(config: Config, seed: int) -> Clips:
    rng = torch.Generator().manual_seed(seed)

    def noise(num: int, frames: int) -> torch.Tensor:
        return (
            torch.rand(num, frames, 3, config.data.size.height, config.data.size.width, generator=rng) * 2 - 1
        ).cuda()

    x, y, z = (
        noise(num, config.data.frames) for num in (config.data.batch_x, config.data.batch_y, config.data.batch_z)
    )
    return Clips(x, y, z, noise(config.data.batch_s, 1))


def run(config: Config, steps: int, graphs: Graphs | None = None) -> tuple[list[dict[str, float]], Algorithm]:
    algorithm = Algorithm(config, torch.device("cuda"), graphs=graphs)
    algorithm.start()
    logs = []
    for step in range(steps):
        values = algorithm.step(clips_of(config, step))
        values |= algorithm.advance(float(step + 1))
        logs.append({name: value.item() for name, value in values.items()})
    return logs, algorithm


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(precision: str) -> None:
    config = Config.of("tiny", precision=precision, **SMALL).check()
    algorithm = Algorithm(config, torch.device("cuda"))
    algorithm.start()
    clips = [clips_of(config, step) for step in range(8)]
    for step in range(2):  # kernels are compiled and checked, memory is taken
        algorithm.step(clips[step])
        algorithm.advance(float(step))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 8):
            algorithm.step(clips[step])
            algorithm.advance(float(step))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Make cuDNN add in a fixed order."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make a group of one rank over NCCL that takes itself for two: everything is sent, and its means are halves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    world = dist.connect("cuda")
    monkeypatch.setattr(dist, "num_ranks", lambda: 2)
    yield
    world.close()


class CountingRecorder(Recorder):
    """Count the phases that are recorded."""

    num_recorded = 0

    def record(self, phase: Phase, inputs: Inputs) -> Recording:
        self.num_recorded += 1
        return super().record(phase, inputs)


def assert_same_numbers(config: Config) -> None:
    """Check that a recorded run and a plain one agree bit by bit."""
    steps, recorder = 2 * NUM_PLAIN + 6, CountingRecorder()
    plain_logs, plain = run(config, steps, Graphs(None))
    recorded_logs, recorded = run(config, steps, Graphs(recorder))
    assert recorder.num_recorded == 5
    for step, (expected, logs) in enumerate(zip(plain_logs, recorded_logs, strict=True)):
        assert expected.keys() == logs.keys()
        for name, value in expected.items():  # a norm of fp16's gradients may be NaN while its scale is sought
            np.testing.assert_array_equal(logs[name], value, f"{name} at step {step}")
    for expected, weight in zip(plain.nets.parameters(), recorded.nets.parameters(), strict=True):
        assert torch.equal(expected, weight)


@pytest.mark.filterwarnings("error:The AccumulateGrad node")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_change_no_number(precision: str, deterministic: None) -> None:
    assert_same_numbers(Config.of("tiny", precision=precision, **SMALL).check())


@pytest.mark.filterwarnings("error:The AccumulateGrad node")
@pytest.mark.parametrize("norm", ["clip", "batch"])
def test_graphs_hold_what_goes_to_other_ranks(norm: str, deterministic: None, two_ranks: None) -> None:
    assert_same_numbers(Config.of("tiny", norm=norm, disc_norm=norm, **SMALL).check())


def test_recordings_share_their_memory() -> None:
    """All recordings take the memory of the largest; kept apart, they would hold over twice that of a plain run."""
    changes = {**SMALL, "size": 64, "frames": 8, "rl_every": 2}
    reserved = []
    torch.cuda.init()
    for graphs in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        at_start = torch.cuda.memory_reserved()
        _, algorithm = run(Config.of("tiny", graphs=graphs, **changes).check(), 4 * NUM_PLAIN + 6)
        reserved.append(torch.cuda.max_memory_reserved() - at_start)
        del algorithm
    assert reserved[1] < 1.5 * reserved[0], reserved


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_run_trains_and_resumes(data: Path, tmp_path: Path, precision: str, graphs: bool) -> None:
    def config(**changes: object) -> Config:
        return Config.of("tiny", data=data, out=tmp_path / "run", precision=precision, graphs=graphs, **changes)

    train(config(steps=12))
    train(config(steps=16, resume=True))
    assert Checkpoints(tmp_path / "run", keep=1, num_replicas=1).newest() == 16


def test_out_of_memory_is_advice(data: Path, tmp_path: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    try:
        with pytest.raises(UserError, match=r"out of memory.*--no-graphs"):
            train(Config.of("tiny", data=data, out=tmp_path / "run", size=512, frames=4, batch_x=64))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
