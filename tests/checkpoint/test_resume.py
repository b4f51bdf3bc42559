"""Tests of what a resumed run gets back, and of the settings that it may change."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from store_cases import one_rank

from rlv2v.checkpoint.resume import restore, save, saved_config, settled_replicas
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.step import Algorithm
from rlv2v.runtime.distributed import World

CPU = torch.device("cpu")


class Cursor:
    """A loader's place in its order of clips."""

    def __init__(self, step: int) -> None:
        self.state: dict[str, Any] = {"step": step, "batch": {"x": 2}}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def algorithm_of(replicas: int = 1, **changes: Any) -> Algorithm:
    return Algorithm(Config.of("tiny", replicas=replicas, widths=(2, 2), disc_widths=(2,), **changes), CPU)


def test_every_part_comes_back(tmp_path: Path) -> None:
    store, algorithm = Checkpoints(tmp_path, keep=1, num_replicas=2), algorithm_of(2)
    replay = algorithm.agents["y"].replays[1]
    clip = replay.put_clip(torch.zeros(4, 16, 16, 3, dtype=torch.uint8).numpy())
    replay.add(state=(clip, 0, 2), action=(clip, 2), reward=1.5, true_frame=(clip, 3), position=3)
    algorithm.schedule.step = 7
    save(store, algorithm, Cursor(5), World(CPU), metric=0.5, run_files={"model.safetensors": b"x"})  # type: ignore[arg-type]
    drawn = torch.rand(3)
    store.wait()
    assert (tmp_path / "model.safetensors").read_bytes() == b"x"
    other, cursor = algorithm_of(2, seed=1), Cursor(0)
    assert restore(store, other, cursor, World(CPU))  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), drawn), "torch's generator"
    assert other.schedule.step == 7 and cursor.state["step"] == 5
    assert len(other.agents["y"].replays[1]) == 1 and not len(other.agents["y"].replays[0])
    for name, weight in algorithm.nets.state_dict().items():
        assert torch.equal(other.nets.state_dict()[name], weight), name


@pytest.mark.parametrize(("replicas", "step"), [(1, 10), (2, 5), (3, 4)])
def test_other_replicas_go_on_after_all_clips_that_were_drawn(tmp_path: Path, replicas: int, step: int) -> None:
    store = Checkpoints(tmp_path, keep=1, num_replicas=2)
    save(store, algorithm_of(2), Cursor(5), World(CPU), metric=None, run_files={})  # type: ignore[arg-type]
    store.wait()
    cursor = Cursor(0)
    assert restore(store, algorithm_of(replicas), cursor, World(CPU))  # type: ignore[arg-type]
    assert cursor.state == {"step": step, "batch": {"x": 2}}


def test_a_checkpoint_of_another_set_up_is_refused_by_part(tmp_path: Path) -> None:
    store = one_rank(tmp_path)
    assert not restore(store, algorithm_of(), Cursor(0), World(CPU))  # type: ignore[arg-type]
    store.save(1, {"nets": algorithm_of().nets.state_dict()}, {0: {}})
    store.wait()
    with pytest.raises(UserError, match="checkpoint 1: lacks 'targets'"):
        restore(store, algorithm_of(), Cursor(0), World(CPU))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="checkpoint 1: 'nets' does not fit this run"):
        restore(store, algorithm_of(head="mask"), SimpleNamespace(), World(CPU))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("replicas", "saved", "num_ranks", "settled", "messages"),
    [
        (0, 0, 2, 2, []),
        (4, 0, 2, 4, []),
        (0, 4, 2, 4, []),
        (2, 4, 2, 2, ["2 replicas, 4 before", "buffers 2 to 3 are dropped"]),
        (0, 2, 3, 3, ["2 replicas do not go evenly into 3 ranks; going on with 3", "buffers 2 to 2 begin empty"]),
        (0, 3, 2, 2, ["3 replicas do not go evenly into 2 ranks", "buffers 2 to 2 are dropped"]),
    ],
)
def test_replicas_are_settled_and_a_change_is_announced(
    replicas: int, saved: int, num_ranks: int, settled: int, messages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert settled_replicas(replicas, saved, num_ranks) == settled
    assert bool(messages) == bool(caplog.text)
    assert all(message in caplog.text for message in messages)


def test_replicas_of_a_new_run_must_go_evenly_into_the_ranks() -> None:
    with pytest.raises(UserError, match="--replicas: expected a multiple of the 2 ranks, got 3"):
        settled_replicas(3, 0, 2)


def test_only_free_settings_may_change(tmp_path: Path) -> None:
    config = Config.of("tiny", out=tmp_path, resume=True)
    with pytest.raises(UserError, match=r"found no config\.json; leave out --resume"):
        saved_config(config)
    (tmp_path / "config.json").write_text(config.to_json())
    assert saved_config(config.replace(steps=9, memory="frames", keep=5)).steps == config.steps
    with pytest.raises(UserError, match=r"--lr: the run in .* has 0.002, got 0.5; leave it out or start a new run"):
        saved_config(config.replace(lr=0.5))
