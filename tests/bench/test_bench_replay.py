"""bench/replay*.py: what they say of our buffer is so, and they see what is wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replay
import replay_faults as faults
import replay_peers as peers
from replay_peers import FRAME, Payload, Peer

from rlv2v.replay import PrioritizedReplay, ReplayBatch

CHECKS = ("shared frames", "far index", "NaN priority", "save and load", "threads", "stale update", "distribution")
SLOW = ("shared frames", "threads", "distribution")


def fast_but(slow: tuple[str, ...], values: Any) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.thorough if value in slow else ()) for value in values]


def payload(video: bool) -> Payload:
    return Payload((4, 4, 3), 3) if video else Payload((16,))


def ours(video: bool = False) -> Peer:
    return replay.build("rlv2v", 512, payload(video))


def tampered(batch: ReplayBatch) -> ReplayBatch:
    batch.rewards[0] += 1
    return batch


@pytest.mark.parametrize(
    "video, cold", [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.thorough)]
)
def test_turns_are_timed_but_for_the_warm_up(video: bool, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "COPY_BYTES", 2**20)
    buffers = {"rlv2v": ours(video), "other": ours(video)}
    times, batches = replay.time_turns(buffers, 2, 10, cold)
    calls = ("add", "sample", "update") if video else ("add", "add 1", "sample", "update")
    assert {len(times[name][call]) for name in buffers for call in calls} == {20 if cold else 16}
    assert buffers["rlv2v"].next_row == 512 + 20 * (64 if video else 65)
    rows = replay.timing_rows("a case", buffers, times, batches)
    assert [row["pass"] for row in rows if row["ours"]] == [call for call in replay.CALLS if call in calls]
    assert all(row["valid"] for row in rows)
    limited = {(row["backend"], row["pass"]) for row in rows if row["percent_of_limit"] is not None}
    assert limited == ({("rlv2v", "sample"), ("other", "sample")} if video else set())
    batches["other"].rewards[5] += 1
    (row,) = (row for row in replay.timing_rows("", buffers, times, batches)[:2] if not row["ours"])
    assert row["wrong_data"] == "1 of 256 rows"


@pytest.mark.parametrize("video", [False, True])
def test_a_byte_of_another_row_is_seen(video: bool) -> None:
    peer = ours(video)
    for part in ("states", "next_states", "actions", "true_frames", "rewards", "positions", "ids"):
        batch = ReplayBatch(*(tensor.clone() for tensor in peer.sample()))
        assert not peer.wrong(batch).any()
        getattr(batch, part)[7].view(-1)[-1] += 1
        assert np.flatnonzero(peer.wrong(batch)).tolist() == [7], part


def test_torn_rows_are_counted() -> None:
    peer = ours()
    peer.sample, sample = lambda: tampered(sample()), peer.sample
    torn, checked = faults.torn_rows(peer, 0.1)
    assert torn * 256 == checked > 0


def test_threads_memory_and_save(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay.thread_row("tiny", ours(), 20, 2)["ratio"] > 0
    for row, frames in zip(replay.memory_rows(512), (528 / 512, 528 / 512 + 1, 8193 / 512), strict=True):
        assert 0 < row["bytes_per_transition"] / (frames * np.prod(FRAME)) - 1 < 0.5
    assert replay.save_row(ours().replay)["valid"]
    load = PrioritizedReplay.load

    def forget(self: PrioritizedReplay, path: Path | str) -> None:
        load(self, path)
        self.update_priorities([0], [100.0])

    monkeypatch.setattr(PrioritizedReplay, "load", forget)
    row = replay.save_row(ours().replay)
    assert row["ours"] and not row["valid"]


@pytest.mark.parametrize("check", fast_but(SLOW, CHECKS))
def test_ours_has_none_of_the_faults(check: str) -> None:
    assert tuple(faults.CHECKS) == CHECKS
    (row,) = faults.fault_rows(["rlv2v"], [check])
    assert row["valid"] and row["ours"] and row["case"] == f"fault, {check}" and row["wrong_data"] is None


def first_row_only(batch: ReplayBatch) -> Any:
    return batch.ids, 0 * batch.rewards.numpy(), batch.weights.numpy()


BROKEN: dict[str, Callable[[Peer], dict[str, Any]]] = {
    "far index": lambda peer: {
        "update": lambda ids, p: setattr(peer, "sample", lambda: tampered(peer.replay.sample(256)))
    },
    "NaN priority": lambda peer: {"update": lambda ids, p: setattr(peer, "read", first_row_only)},
    "save and load": lambda peer: {"load": lambda path: peer.fill()},
    "stale update": lambda peer: {"update": lambda ids, p: peer.replay.update_priorities([peer.next_row - 1], p)},
    "distribution": lambda peer: {"update": lambda ids, p: None},
}


@pytest.mark.parametrize("check", fast_but(SLOW, BROKEN))
def test_the_checks_see_a_broken_buffer(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(capacity: int, payload: Payload) -> Peer:
        peer = peers.ours(capacity, payload)
        for name, call in BROKEN[check](peer).items():
            setattr(peer, name, call)
        return peer

    monkeypatch.setitem(peers.MAKERS, "rlv2v", broken)
    (row,) = faults.fault_rows(["rlv2v"], [check])
    assert row["valid"] is False and "raises" not in row["wrong_data"], row


def test_a_crash_a_hang_and_an_exception_are_outcomes() -> None:
    assert faults.isolated(lambda name: os.kill(os.getpid(), signal.SIGSEGV), "x") == ("segmentation fault", False)
    assert faults.isolated(lambda name: time.sleep(60), "x", 0.2) == ("hangs: no end in 0.2 s", False)
    assert faults.isolated(lambda name: 1 // 0, "x")[0].startswith("raises ZeroDivisionError")
    assert faults.isolated(lambda name: (name, True), "x") == ("x", True)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cpprb", "tianshou", "torchrl"])
@pytest.mark.parametrize("video", [False, True])
def test_a_peer_returns_the_rows_it_was_given(name: str, video: bool) -> None:
    pytest.importorskip(peers.MODULES.get(name, name), exc_type=ImportError)
    buffers = {"rlv2v": ours(video), name: replay.build(name, 512, payload(video))}
    times, batches = replay.time_turns(buffers, 1, 20, False)
    assert all(row["valid"] for row in replay.timing_rows("a case", buffers, times, batches))
    peer = buffers[name]
    assert peer.read(batches[name])[1].max() > 512  # new rows are drawn
    peer.update(np.array([511]), np.full(1, 1e6, np.float32))
    _, rewards, _ = peer.read(peer.sample())
    assert (rewards == np.bincount(rewards.astype(np.int64)).argmax()).mean() > 0.5


@pytest.mark.thorough
def test_faults_of_cpprb_are_seen() -> None:
    pytest.importorskip("cpprb")
    outcome, valid = faults.isolated(faults.nan_priority, "cpprb")
    assert not valid and "draws 1 of 1024 rows" in outcome
    assert faults.isolated(faults.save_and_load, "cpprb") == ("priorities are lost", False)
