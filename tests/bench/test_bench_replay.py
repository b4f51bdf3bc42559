"""bench/replay.py: what it says of our buffer is so, and it sees what is wrong."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlv2v.replay import PrioritizedReplay, ReplayBatch

OURS = ("shared frames", "far index", "NaN priority", "save and load", "threads", "stale update", "distribution")


pytestmark = pytest.mark.usefixtures("bench_folder")


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def ours(video: bool = False, capacity: int = 512) -> Any:
    payload = module("replay_rows").Payload((4, 4, 3), 3) if video else module("replay_rows").Payload((16,), 1)
    return module("replay").build("rlv2v", capacity, payload, video)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("cold", [False, True])
def test_turns_are_timed_but_for_the_warm_up(video: bool, cold: bool) -> None:
    peers = {"rlv2v": ours(video), "cpprb": ours(video)}
    peers["cpprb"].share = 2
    times, batches = module("replay").turns(peers, 2, 10, cold)
    calls = ("add", "sample", "update") if video else ("add", "add 1", "sample", "update")
    turns = {name: {len(times[name][call]) for call in calls} for name in peers}
    assert turns == ({"rlv2v": {20}, "cpprb": {10}} if cold else {"rlv2v": {16}, "cpprb": {8}})
    assert peers["rlv2v"].next_row == 512 + 20 * (64 if video else 65)
    rows = module("replay").timing_rows("a case", peers, times, batches, video=video)
    assert len(rows) == 2 * len(calls) and all(row["valid"] and row["wrong_data"] is None for row in rows)
    assert all((row["percent_of_memcpy"] is not None) == (video and row["pass"] == "sample") for row in rows)
    batches["cpprb"].rewards[5] += 1
    assert [row["wrong_data"] for row in module("replay").timing_rows("", peers, times, batches, False)] == [
        None, "1 of 256 rows"
    ] * len(calls)  # fmt: skip


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("part", ["states", "next_states", "actions", "true_frames", "rewards", "positions", "ids"])
def test_a_byte_of_another_row_is_seen(video: bool, part: str) -> None:
    peer = ours(video)
    batch = ReplayBatch(*(tensor.clone() for tensor in peer.sample()))
    assert not peer.wrong(batch).any()
    getattr(batch, part)[7].view(-1)[-1] += 1
    assert np.flatnonzero(peer.wrong(batch)).tolist() == [7]


def test_torn_rows_are_counted() -> None:
    peer = ours()
    torn, checked = module("replay_faults").torn_rows(peer, 0.3)
    assert torn == 0 and checked > 1000
    sample = peer.sample

    def tear() -> ReplayBatch:
        batch = sample()
        batch.actions[:3] += 1
        return batch

    peer.sample = tear
    torn, checked = module("replay_faults").torn_rows(peer, 0.1)
    assert torn * 256 == checked * 3


def test_threads_memory_and_save(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = module("replay")
    rate, beside = replay.thread_rows("tiny", ours(), 20, 2, 0.1)
    assert rate["ratio"] > 0 and beside["torn_rows"] == 0 and beside["valid"]
    for row, frames in zip(replay.memory_rows(512), (528 / 512, 528 / 512 + 1, 8193 / 512), strict=True):
        assert row["frames_per_transition"] == round(frames, 4)
        whole = frames * 64 * 64 * 3 + row["bytes_beside_frames"]
        assert abs(row["bytes_per_transition"] - whole) < 1
    assert replay.save_row(ours().replay)["valid"]
    load = PrioritizedReplay.load

    def forget(self: PrioritizedReplay, path: Path | str) -> None:
        load(self, path)
        self.update_priorities([0], [100.0])

    monkeypatch.setattr(PrioritizedReplay, "load", forget)
    row = replay.save_row(ours().replay)
    assert not row["valid"] and replay.ours_failed([row])
    assert not replay.ours_failed([row | {"backend": "cpprb"}, row | {"valid": True}])


@pytest.mark.parametrize("check", OURS)
def test_ours_has_none_of_the_faults(check: str) -> None:
    faults = module("replay_faults")
    assert tuple(faults.CHECKS) == OURS
    said, valid = faults.isolated(faults.CHECKS[check], "rlv2v")
    assert valid, said


BROKEN: dict[str, dict[str, Callable[..., Any]]] = {
    "far index": {"update": lambda peer, ids, p: setattr(peer, "sample", lambda count=256: tampered(peer))},
    "NaN priority": {"update": lambda peer, ids, p: setattr(peer, "read", lambda batch: peer.ours(batch, 0))},
    "save and load": {"load": lambda peer, path: peer.fill()},
    "stale update": {"update": lambda peer, ids, p: peer.replay.update_priorities([peer.next_row - 1], p)},
    "distribution": {"update": lambda peer, ids, p: None},
}


def tampered(peer: Any) -> ReplayBatch:
    batch = peer.replay.sample(256)
    batch.rewards[0] += 1
    return batch


@pytest.mark.parametrize("check", BROKEN)
def test_the_checks_see_a_broken_buffer(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, faults = module("replay_peers"), module("replay_faults")
    same_row = {"ours": lambda peer, batch, row: (batch.ids, 0 * batch.rewards.numpy() + row, batch.weights.numpy())}
    monkeypatch.setitem(peers.MAKERS, "rlv2v", type("Broken", (peers.Ours,), same_row | BROKEN[check]))
    said, valid = faults.isolated(faults.CHECKS[check], "rlv2v")
    assert valid is False and "raises" not in said, said


def test_a_crash_a_hang_and_an_exception_are_outcomes() -> None:
    isolated = module("replay_faults").isolated
    assert isolated(lambda name: os.kill(os.getpid(), signal.SIGSEGV), "x") == ("segmentation fault", False)
    assert isolated(lambda name: time.sleep(60), "x", 0.2) == ("hangs: no end in 0.2 s", False)
    assert isolated(lambda name: 1 // 0, "x")[0].startswith("raises ZeroDivisionError")
    assert isolated(lambda name: (name, True), "x") == ("x", True)


def test_fault_rows_come_from_another_process() -> None:
    (row,) = module("replay_faults").fault_rows(["rlv2v"], ["far index"])
    assert row["case"] == "fault, far index" and row["outcome"] == "refused (IndexError)" and row["valid"]
    with pytest.raises(RuntimeError, match="0 of 1 fault checks came back"):
        list(module("replay_faults").fault_rows(["rlv2v"], ["no such check"]))


@pytest.mark.parametrize("name", ["cpprb", "torchrl"])
@pytest.mark.parametrize("video", [False, True])
def test_a_peer_returns_the_rows_it_was_given(name: str, video: bool) -> None:
    pytest.importorskip(module("replay_peers").MAKERS[name].module)
    payload = module("replay_rows").Payload((4, 4, 3), 3) if video else module("replay_rows").Payload((16,), 1)
    peers = {"rlv2v": ours(video), name: module("replay").build(name, 512, payload, video)}
    times, batches = module("replay").turns(peers, 1, 20, False)
    rows = module("replay").timing_rows("a case", peers, times, batches, False)
    assert all(row["valid"] for row in rows)
    assert peers[name].read(batches[name])[1].max() > 512  # new rows are drawn
    peers[name].update(np.array([511]), np.full(1, 1e6, np.float32))
    _, rewards, _ = peers[name].read(peers[name].sample())
    assert (rewards == np.bincount(rewards.astype(np.int64)).argmax()).mean() > 0.5


def test_faults_of_cpprb_are_seen() -> None:
    pytest.importorskip("cpprb")
    faults = module("replay_faults")
    said, valid = faults.isolated(faults.nan_priority, "cpprb")
    assert not valid and "draws 1 of 1024 rows" in said
    assert faults.isolated(faults.save_and_load, "cpprb") == ("priorities are lost", False)
