"""Test that the buffer returns what was added, bounds its memory, saves, refuses bad input, and serves threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay_cases import FRAME, MAX_LEN, filled, frames, row, same
from safetensors.torch import save_file

from rlv2v.errors import UserError
from rlv2v.replay import PrioritizedReplay, ReplayBatch


def test_a_batch_has_the_documented_shapes_and_dtypes() -> None:
    batch = filled().sample(64)
    assert set(batch.ids.tolist()) == set(range(4, 12))
    byte, int64, real = torch.uint8, torch.int64, torch.float32
    assert {name: (part.dtype, tuple(part.shape[1:])) for name, part in batch._asdict().items()} == {
        "states": (byte, (MAX_LEN, *FRAME)),
        "lengths": (int64, ()),
        "actions": (byte, FRAME),
        "rewards": (real, ()),
        "next_states": (byte, (MAX_LEN + 1, *FRAME)),
        "next_lengths": (int64, ()),
        "discounts": (real, ()),
        "true_frames": (byte, FRAME),
        "positions": (int64, ()),
        "terminals": (torch.bool, ()),
        "ids": (int64, ()),
        "weights": (real, ()),
    }


def test_one_and_batch_and_every_kind_of_array_are_the_same() -> None:
    video = np.arange(5 * np.prod(FRAME), dtype=np.uint64).astype(np.uint8).reshape(5, *FRAME)
    one, batch, tensors, windows = (PrioritizedReplay(10, FRAME, MAX_LEN) for _ in range(4))
    for k in range(3):
        action = np.asfortranarray(video[k])  # another layout of the same frame
        assert k == one.add(state=video[k : k + 2], action=action, reward=k, true_frame=video[k + 2], position=2)
    clip = batch.put_clip(video)
    ids = batch.add(
        state=[(clip, k, 2) for k in range(3)],
        action=[(clip, 0), video[1], (clip, 2)],
        reward=[0, 1, 2],
        true_frame=[(clip, k + 2) for k in range(3)],
        position=2,
    )
    assert torch.equal(torch.as_tensor(ids), torch.arange(3))
    frames_in = torch.from_numpy(video)
    tensors.add(
        state=torch.stack([frames_in[k : k + 2] for k in range(3)]),
        action=frames_in[:3],
        reward=torch.arange(3.0),
        true_frame=frames_in[2:5],
        position=torch.full((3,), 2),
        terminal=[False] * 3,
    )
    clip, k = windows.put_clip(video), np.arange(3)
    windows.add(state=(clip, k, 2), action=(clip, k), reward=k.astype(np.float32), true_frame=(clip, k + 2), position=2)
    expected = one.sample(32)
    for other in (batch, tensors, windows):
        assert same(expected, other.sample(32))


def test_a_clip_lives_as_long_as_its_handle_and_its_frames_as_long_as_a_transition() -> None:
    replay = PrioritizedReplay(2, FRAME, MAX_LEN)
    clip = replay.put_clip(frames(5, 9))
    replay.add(state=(clip, 0, 3), action=(clip, 3), reward=0.0, true_frame=(clip, 3), position=3)
    assert (len(clip), replay.stats["frames"], replay.stats["clips"]) == (5, 5, 1)
    del clip
    assert (replay.stats["frames"], replay.stats["clips"]) == (4, 0)
    assert (replay.sample(4).true_frames == 9).all()
    unused = replay.put_clip(frames(7, 1))
    unused.release()
    unused.release()
    assert replay.stats["frames"] == 4


def assert_of_one_transition(batch: ReplayBatch) -> None:
    """Check that all of a row made by `row` holds one value, and that it ends where its length says."""
    values = batch.positions.to(torch.uint8)[:, None, None, None]
    assert (batch.rewards == batch.positions).all()
    assert (batch.actions == values).all() and (batch.true_frames == values).all()
    for frames_of, lengths in ((batch.states, batch.lengths), (batch.next_states, batch.next_lengths)):
        there = torch.arange(frames_of.shape[1]) < lengths[:, None]
        assert (frames_of == values[:, None] * there[..., None, None, None]).all()


def test_memory_is_bounded() -> None:
    frame_bytes = int(np.prod(FRAME))
    replay = filled(capacity=100, count=50, max_bytes=20 * frame_bytes)
    assert replay.stats["frames"] <= 20
    assert 4 <= len(replay) < 10
    batch = replay.sample(64)
    assert batch.ids.min() >= replay.stats["evicted"]
    assert_of_one_transition(batch)
    unbounded = filled(capacity=100, count=50)
    assert unbounded.bytes_used > 50 * 2 * frame_bytes
    clip = replay.put_clip(frames(18, 0))
    with pytest.raises(ValueError, match="release clips or raise max_bytes"):
        replay.add(**row(0))
    clip.release()
    replay.add(**row(0))


def test_state_dict_continues_with_the_same_samples(tmp_path: Path) -> None:
    replay = filled(alpha=0.7, beta=0.3, stratified=False, seed=2**64 - 1)
    clip = replay.put_clip(frames(3, 77))
    replay.add(state=(clip, 0, 2), action=(clip, 2), reward=1.5, true_frame=(clip, 2), position=2)
    assert replay.update_priorities(range(4, 9), [9.0, 0.1, 0.0, 5.0, 1e-42]) == 1  # id 4 is gone
    replay.sample(5)
    replay.save(tmp_path / "replay.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["replay.pt"]
    other = filled(count=3)
    other.load(tmp_path / "replay.pt")
    assert (other.alpha, other.beta, len(other), other.stats["stale"]) == (0.7, 0.3, 8, 1)
    for step in range(50):
        ours, theirs = replay.sample(7), other.sample(7)
        assert same(ours, theirs)
        priorities = torch.rand(7, generator=torch.Generator().manual_seed(step))
        for buffer in (replay, other):
            buffer.update_priorities(ours.ids, priorities)
            buffer.add(**row(step, 2))
    assert other.is_consistent()


def test_a_clip_from_before_a_load_is_refused() -> None:
    replay = filled()
    old = replay.put_clip(frames(2, 0))
    replay.load_state_dict(replay.state_dict())
    new = replay.put_clip(frames(2, 1))
    with pytest.raises(ValueError, match="clip that the buffer holds"):
        replay.add(**row(1, 2, state=(old, 0, 1)))
    old.release()
    replay.add(**row(1, 2, state=(new, 0, 1)))
    assert replay.is_consistent()


SPOILS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "capacity": lambda state: state.update(capacity=9),
    "frame_shape": lambda state: state.update(frame_shape=[4, 6, 1]),
    "format": lambda state: state.update(format=1),
    "gamma": lambda state: state.update(gamma=0.5),
    "frames": lambda state: state.update(frames=state["frames"].float()),
    "table": lambda state: state["table"].fill_(10**6),
    "lengths": lambda state: state["lengths"].fill_(-1),
    "rewards": lambda state: state["rewards"].fill_(float("nan")),
    "priorities": lambda state: state["priorities"].fill_(-1.0),
    "oldest_id": lambda state: state.update(oldest_id=-1),
    "counters": lambda state: state.update(sampled=2**64 - 1),
    "alpha": lambda state: state.update(alpha=float("nan")),
    "max_priority": lambda state: state.update(max_priority=float("inf")),
    "terminals": lambda state: state["terminals"].fill_(2),
    "seed": lambda state: state.pop("seed"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_spoilt_state_is_refused_and_changes_nothing(name: str) -> None:
    replay, twin = filled(), filled()
    state = filled(count=10).state_dict()
    SPOILS[name](state)
    with pytest.raises(UserError, match=name):
        replay.load_state_dict(state)
    assert same(replay.sample(32), twin.sample(32))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    replay, path = filled(), tmp_path / "replay.pt"
    replay.save(path)
    complete = path.read_bytes()
    for content in (b"", b"junk", complete[: len(complete) // 2], complete[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"replay\.pt"):
            replay.load(path)
    save_file({"frames": torch.zeros(1, dtype=torch.bfloat16)}, path, {"state": "[]", "sha256": ""})
    with pytest.raises(UserError, match="broken or foreign"):
        replay.load(path)
    torch.save({"code": print}, path)
    with pytest.raises(UserError, match=r"replay\.pt"):
        replay.load(path)
    with pytest.raises(UserError, match="missing"):
        replay.load(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="cannot write"):
        replay.save(tmp_path / "missing" / "replay.pt")
    assert len(replay) == 8


BAD_ADDS: dict[str, dict[str, Any]] = {
    "state must be uint8": {"state": frames(2, 1).astype(np.float32)},
    r"state must be uint8 \(n, 4, 6, 3\), got uint8 \(2, 4, 6, 1\)": {"state": frames(2, 1)[..., :1]},
    r"state must have 1\.\.3 frames, got 4": {"state": frames(4, 1)},
    r"state must have 1\.\.3 frames, got 0": {"state": frames(0, 1)},
    "action must be uint8": {"action": frames(1, 1)},
    "true_frame must be uint8": {"true_frame": None},
    "reward must be finite, got nan": {"reward": float("nan")},
    "reward must be finite, got inf": {"reward": 1e300},
    "reward must be finite, got inf$": {
        "reward": [1.0, float("inf")],
        **{"state": [frames(2, 1)] * 2, "action": frames(2, 1), "true_frame": frames(2, 1)},
    },
    "reward must be real numbers": {"reward": "much"},
    "position must be integers": {"position": 1.5},
    "terminal must be booleans": {"terminal": 0.5},
    "one entry for each of 1 rewards, got 2": {"reward": [1.0], "state": [frames(2, 1)] * 2, "action": frames(1, 1)},
    r"reward must have shape \(n,\)": {"reward": [[1.0]]},
    r"position must have shape \(1,\)": {"position": [1, 2]},
}


@pytest.mark.parametrize("message", BAD_ADDS)
def test_a_bad_transition_is_refused_and_changes_nothing(message: str) -> None:
    replay = filled()
    stats = replay.stats
    with pytest.raises(ValueError, match=message):
        replay.add(**row(1, 2, **BAD_ADDS[message]))
    assert replay.stats == stats


def test_bad_clip_references_are_refused() -> None:
    replay, other = filled(), filled()
    clip, foreign = replay.put_clip(frames(4, 1)), other.put_clip(frames(4, 1))
    with pytest.raises(ValueError, match=r"clip must be uint8 \(n, 4, 6, 3\)"):
        replay.put_clip(frames(1, 1)[0])
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        replay.put_clip(frames(0, 1))
    for state in ((clip, 2, 3), (clip, -1, 2), (clip, 0, 0), (clip, 2**62, 2), (clip, 0, -(2**62))):
        with pytest.raises(IndexError, match="state"):
            replay.add(**row(1, 2, state=state))
    for frame in ((clip, 4), (clip, -1)):
        with pytest.raises(IndexError, match="true_frame"):
            replay.add(**row(1, 2, true_frame=frame))
    for bad in ((foreign, 0, 2), (clip, 0), (clip, 0, 1.5)):
        with pytest.raises(ValueError, match="replay"):
            replay.add(**row(1, 2, state=bad))
    clip.release()
    with pytest.raises(ValueError, match="clip that the buffer holds"):
        replay.add(**row(1, 2, state=(clip, 0, 2)))
    assert replay.stats["added"] == 12


def test_bad_priorities_and_unknown_ids_are_refused_and_change_nothing() -> None:
    replay, twin = filled(), filled()
    for bad in (float("nan"), float("inf"), -1.0, 1e39):
        with pytest.raises(ValueError, match="priority must be finite"):
            replay.update_priorities([5, 6], [9.0, bad])
    for unknown in (-1, 12, 2**62):
        with pytest.raises(IndexError, match="id must be one that add returned"):
            replay.update_priorities([5, unknown], [9.0, 1.0])
    for ids, priorities in (([5, 6], [1.0]), ([0.5], [1.0]), ([[5]], [1.0]), ([5], ["high"])):
        with pytest.raises(ValueError, match="replay"):
            replay.update_priorities(ids, priorities)
    assert same(replay.sample(64), twin.sample(64))


def test_sampling_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="the buffer is empty"):
        PrioritizedReplay(4, FRAME, MAX_LEN).sample(1)
    replay = filled()
    for n in (0, -1, 1.5, None, 2**70):
        with pytest.raises(ValueError, match="n must be"):
            replay.sample(n)  # type: ignore[arg-type]
    replay.update_priorities(range(4, 12), np.zeros(8))
    with pytest.raises(ValueError, match="priority above 0, all are 0"):
        replay.sample(1)
    replay.update_priorities([7], [1e-30])
    assert set(replay.sample(16).ids.tolist()) == {7}


BAD_SETTINGS: list[dict[str, Any]] = [
    *({"capacity": bad} for bad in (0, -1, 2**40)),
    *({"frame_shape": bad} for bad in ((4, 0, 3), (2**30, 2**30, 3))),
    *({"alpha": bad} for bad in (-0.1, float("nan"))),
    {"max_len": 0},
    {"beta": 1.1},
    {"seed": -1},
    {"max_bytes": 10},
]


@pytest.mark.parametrize("options", BAD_SETTINGS, ids=str)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="replay: "):
        PrioritizedReplay(**{"capacity": 4, "frame_shape": FRAME, "max_len": 3, **options})


def test_threads_see_rows_of_one_transition() -> None:
    replay = filled(capacity=16, count=1)
    torn: list[AssertionError] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            batch = replay.sample(8)
            try:
                assert_of_one_transition(batch)
            except AssertionError as error:
                torn.append(error)
            replay.update_priorities(batch.ids, batch.weights + 0.5)

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for thread in watchers:
        thread.start()
    for k in range(2000):
        clip = replay.put_clip(frames(3, k % 256))
        replay.add(**row(k % 256, state=(clip, 0, 1 + k % 3), action=(clip, 0)))
    done.set()
    for thread in watchers:
        thread.join()
    assert not torn
    assert replay.is_consistent()
    assert (len(replay), replay.stats["clips"], replay.stats["added"]) == (16, 1, 2001)
