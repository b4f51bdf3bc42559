"""Test reused memory, outputs in the caller's arrays, frames in a scratch file, and files that survive kills."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replay_cases import same

from rlv2v.errors import UserError
from rlv2v.replay import PrioritizedReplay, ReplayBatch

FRAME = (8, 8, 3)


def filled(count: int = 12, **options: Any) -> PrioritizedReplay:
    replay = PrioritizedReplay(8, FRAME, 2, **options)
    values = np.arange(count, dtype=np.uint8)
    frames = np.broadcast_to(values[:, None, None, None], (count, *FRAME))
    replay.add(state=frames[:, None], action=frames, reward=values.astype(float), true_frame=frames, position=values)
    return replay


def test_memory_is_reused_only_when_nothing_refers_to_it() -> None:
    replay, twin = filled(), filled(ring=0)
    address = replay.sample(4).states.data_ptr()
    assert replay.sample(4).states.data_ptr() == address
    held = [replay.sample(4)]
    held_view = replay.sample(4).rewards[1:]
    held_array = replay.sample(4).ids.numpy()
    held_rows = [replay.sample(4).states[0] for _ in range(6)]
    for _ in range(2):
        twin.sample(4)
    assert torch.equal(held[0].ids, twin.sample(4).ids)
    assert torch.equal(held_view, twin.sample(4).rewards[1:])
    assert torch.equal(torch.from_numpy(held_array), twin.sample(4).ids)
    for row in held_rows:
        assert torch.equal(row, twin.sample(4).states[0])


def test_full_states_are_a_view_of_the_next_states() -> None:
    replay, twin = PrioritizedReplay(4, FRAME, 2), PrioritizedReplay(4, FRAME, 2)
    rng = np.random.default_rng(0)
    for length, shared in ((2, True), (2, True), (1, False), (2, False), (2, False), (2, False), (2, True)):
        frames = rng.integers(0, 256, (length + 2, *FRAME), np.uint8)
        for buffer in (replay, twin):
            buffer.add(state=frames[:length], action=frames[-1], reward=0.0, true_frame=frames[-2], position=0)
        batch = replay.sample(6)
        out = ReplayBatch(*(torch.empty(part.shape, dtype=part.dtype) for part in batch))
        assert same(batch, twin.sample(6, out=out))
        assert (batch.states.data_ptr() == batch.next_states.data_ptr()) is shared
        assert (batch.actions.data_ptr() == batch.next_states[0, 2].data_ptr()) is shared
        held = batch.states
        del batch
        assert replay.sample(6).states.data_ptr() not in (held.data_ptr(), 0)
        twin.sample(6)


@pytest.mark.parametrize("lengths", [(4,), (1, 4, 3)], ids=["full", "some short"])
def test_large_frames_and_batches_that_bypass_the_caches_are_right(lengths: tuple[int, ...]) -> None:
    """Frames of 12 KiB and a batch of 34 MB are far above where streaming begins."""
    frame, n = (64, 64, 3), 256
    replay = PrioritizedReplay(50, frame, 4)
    video = np.random.default_rng(0).integers(0, 256, (150, *frame), np.uint8)
    for k in range(140):
        p = lengths[k % len(lengths)]
        replay.add(state=video[k : k + p], action=video[k + 5], reward=k, true_frame=video[k + 6], position=k)
    batch = replay.sample(n)
    for row, k in enumerate(batch.positions.tolist()):
        p = lengths[k % len(lengths)]
        assert np.array_equal(batch.states[row, :p], video[k : k + p]) and not batch.states[row, p:].any()
        assert np.array_equal(batch.next_states[row, :p], video[k : k + p])
        assert np.array_equal(batch.next_states[row, p], video[k + 5]) and not batch.next_states[row, p + 1 :].any()
        assert np.array_equal(batch.actions[row], video[k + 5])
        assert np.array_equal(batch.true_frames[row], video[k + 6])


@pytest.mark.parametrize("full", [False, True])
def test_ids_of_a_batch_are_those_of_its_own_memory(full: bool) -> None:
    """The core recognises a batch's tensor of ids; every other form of the same ids must do the same."""
    forms: list[Callable[[torch.Tensor], Any]] = [
        lambda ids: ids,
        lambda ids: ids.numpy(),
        lambda ids: ids.clone(),
        lambda ids: ids[:],
        lambda ids: ids.tolist(),
    ]
    states = []
    for form in forms:
        replay = PrioritizedReplay(16, FRAME, 2, seed=2)
        for k in range(20):
            zero = np.zeros((2 if full else 1 + k % 2, *FRAME), np.uint8)
            replay.add(state=zero, action=zero[0], reward=k, true_frame=zero[0], position=k)
        batches = [replay.sample(6) for _ in range(6)]  # more than the ring holds
        for batch in (batches[-1], batches[0], batches[3]):
            replay.update_priorities(form(batch.ids), np.linspace(0.1, 0.9, 6))
        states.append(replay.state_dict()["priorities"])
    assert len(set(states[0].tolist())) > 3 and states[0].min() < 1
    assert all(torch.equal(states[0], other) for other in states[1:])


def test_ids_written_by_the_caller_count() -> None:
    replay = filled()
    batch = replay.sample(2)
    batch.ids[:] = torch.tensor([5, 0])
    assert replay.update_priorities(batch.ids, [0.5, 0.5]) == 1  # 0 is gone
    assert replay.state_dict()["priorities"].tolist() == [1, 0.5, 1, 1, 1, 1, 1, 1]


def test_without_torchs_count_of_users_no_memory_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    replay = filled()
    first = replay.sample(4)
    states = first.states.clone()
    replay.sample(4)
    assert torch.equal(first.states, states)
    assert replay.update_priorities(first.ids, np.ones(4, np.float32)) == 0


FORK = """
import os, sys
import numpy as np
from rlv2v.replay import PrioritizedReplay
replay = PrioritizedReplay(10, (64, 64, 3), 4, storage="mmap", path=sys.argv[1])
frames = np.zeros((4, 64, 64, 3), np.uint8)
clip = replay.put_clip(frames)
add = lambda buffer: buffer.add(state=frames, action=frames[0], reward=0.0, true_frame=frames[1], position=0)
add(replay)
child = os.fork()
if child == 0:
    for call in (lambda: add(replay), lambda: replay.sample(1), lambda: replay.update_priorities([0], [1.0]),
                 lambda: replay.stats, lambda: replay.alpha, replay.state_dict):
        try:
            call()
        except RuntimeError as error:
            assert "one process owns a buffer" in str(error), error
        else:
            os._exit(1)
    clip.release()
    own = PrioritizedReplay(10, (64, 64, 3), 4)
    add(own)
    os._exit(0 if own.sample(1).ids.tolist() == [0] else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
add(replay)
assert replay.stats["clips"] == 1 and replay.is_consistent()
print("done")
"""


def run_script(script: str, *arguments: object) -> None:
    """Run a script in a process of its own, which prints "done" at its end."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("done", 0), done.stderr


def test_a_forked_child_is_refused_and_the_owner_goes_on(tmp_path: Path) -> None:
    run_script(FORK, tmp_path / "frames")


def test_samples_go_into_the_callers_arrays() -> None:
    replay, twin = filled(), filled()
    out = ReplayBatch(*(torch.empty(part.shape, dtype=part.dtype) for part in twin.sample(5)))
    replay.sample(5)
    assert replay.sample(5, out=out) is out
    expected = twin.sample(5)
    assert same(out, expected)
    arrays = ReplayBatch(*(part.numpy() for part in out))  # type: ignore[arg-type]
    replay.sample(5, out=arrays)
    assert torch.equal(out.ids, twin.sample(5).ids)
    read_only = out.ids.numpy().copy()
    read_only.flags.writeable = False
    bad: list[Any] = [out.ids[:4], out.ids.int(), torch.empty(10, dtype=torch.int64)[::2], read_only]
    for ids in bad:
        with pytest.raises(ValueError, match=r"out\.ids"):
            replay.sample(5, out=out._replace(ids=ids))
    with pytest.raises(ValueError, match="12 parts"):
        replay.sample(5, out=out[:3])  # type: ignore[arg-type]
    assert torch.equal(replay.sample(5).ids, twin.sample(5).ids), "a refused call draws nothing"


def test_frames_in_a_file_are_the_same_frames(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    replay, twin = filled(storage="mmap", path=path), filled()
    assert not list(tmp_path.iterdir()), "the file has no name: nothing is left behind"
    for _ in range(20):
        ours, theirs = replay.sample(8), twin.sample(8)
        assert same(ours, theirs)
    replay.load_state_dict(twin.state_dict())
    assert torch.equal(replay.sample(8).states, twin.sample(8).states)
    path.write_text("mine")
    with pytest.raises(OSError, match="cannot create storage file"):
        filled(storage="mmap", path=path)
    assert path.read_text() == "mine"
    for options in ({"storage": "mmap"}, {"path": path}, {"storage": "disk", "path": path}):
        with pytest.raises(ValueError, match="storage memory, or mmap with its path"):
            filled(**options)


FULL_DISK = """
import resource, sys
import numpy as np
from rlv2v.replay import PrioritizedReplay
replay = PrioritizedReplay(1000, (64, 64, 3), 4, storage="mmap", path=sys.argv[1], seed=1)
frames = np.zeros((100, 4, 64, 64, 3), np.uint8)
batch = dict(state=frames, action=frames[:, 0], reward=np.zeros(100), true_frame=frames[:, 1], position=0)
replay.add(**batch)
stats = replay.stats
resource.setrlimit(resource.RLIMIT_FSIZE, (2**23, 2**23))
for call in (lambda: replay.add(**batch), lambda: replay.put_clip(np.zeros((600, 64, 64, 3), np.uint8))):
    try:
        call()
    except OSError as error:
        assert "cannot grow storage file" in str(error), error
    else:
        raise SystemExit("a file that cannot grow was not noticed")
    unchanged = replay.stats | {"bytes_used": stats["bytes_used"]} == stats  # memory that it did get stays for later
    assert unchanged and replay.is_consistent()
replay.sample(16)
print("done")
"""


def test_a_full_disk_is_an_exception_and_changes_nothing(tmp_path: Path) -> None:
    run_script(FULL_DISK, tmp_path / "frames")


def test_any_wrong_bit_of_a_file_is_seen(tmp_path: Path) -> None:
    replay, path = filled(), tmp_path / "replay"
    replay.save(path)
    content = bytearray(path.read_bytes())
    rng, twin = np.random.default_rng(0), filled()
    for position in rng.integers(0, len(content), 300):
        spoilt = content.copy()
        spoilt[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match="replay"):
            replay.load(path)
    assert same(replay.sample(32), twin.sample(32)), "a refused file changes nothing"


KILLS = """
import os, random, signal, sys, time
import numpy as np
from rlv2v.replay import PrioritizedReplay

def buffer():
    return PrioritizedReplay(500, (16, 16, 3), 1)

def save_for_ever(path, pipe):
    replay, frames = buffer(), np.zeros((500, 16, 16, 3), np.uint8)
    for turn in range(10**9):
        frames[:] = turn % 251
        position = np.full(500, turn)
        replay.add(state=frames[:, None], action=frames, reward=np.zeros(500), true_frame=frames, position=position)
        replay.save(path)
        os.write(pipe, turn.to_bytes(4, "little"))

path, kills, chance = sys.argv[1], int(sys.argv[2]), random.Random(0)
loaded = buffer()
for kill in range(kills):
    if os.path.exists(path):
        os.unlink(path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(path, write)
    os.close(write)
    turns = os.read(read, 4)
    time.sleep(chance.uniform(0, 0.03))  # to kill it anywhere in a save
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 4096):
        turns += more
    os.close(read)
    announced = int.from_bytes(turns[len(turns) // 4 * 4 - 4 : len(turns) // 4 * 4], "little")
    loaded.load(path)
    batch = loaded.sample(200)
    turn = int(batch.positions[0])
    assert turn in (announced, announced + 1), (kill, turn, announced)
    assert (batch.positions == turn).all() and (batch.states == turn % 251).all()
print("done")
"""


@pytest.mark.parametrize("kills", [5, pytest.param(200, marks=pytest.mark.thorough)])
def test_kills_during_save_leave_the_old_file_or_the_new(tmp_path: Path, kills: int) -> None:
    """After kill -9 at a random time the file is the last one announced, or the next."""
    run_script(KILLS, tmp_path / "replay", kills)
