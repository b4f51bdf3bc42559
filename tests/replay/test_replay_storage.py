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
from replay_cases import FRAME, filled, row, same

from rlv2v.errors import UserError
from rlv2v.replay import PrioritizedReplay, ReplayBatch


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
    for state in held_rows:
        assert torch.equal(state, twin.sample(4).states[0])


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
    for j, k in enumerate(batch.positions.tolist()):
        p = lengths[k % len(lengths)]
        next_state = np.concatenate((video[k : k + p], video[k + 5 : k + 6]))
        assert np.array_equal(batch.states[j, :p], video[k : k + p]) and not batch.states[j, p:].any()
        assert np.array_equal(batch.next_states[j, : p + 1], next_state) and not batch.next_states[j, p + 1 :].any()
        assert np.array_equal(batch.actions[j], video[k + 5])
        assert np.array_equal(batch.true_frames[j], video[k + 6])


FORMS: list[Callable[[torch.Tensor], Any]] = [
    lambda ids: ids,
    lambda ids: ids.numpy(),
    lambda ids: ids.clone(),
    lambda ids: ids[:],
    lambda ids: ids.tolist(),
]


@pytest.mark.parametrize("full", [False, True])
def test_ids_of_a_batch_are_those_of_its_own_memory(full: bool) -> None:
    """The core recognises a batch's tensor of ids; every other form of the same ids must do the same."""
    states = []
    for form in FORMS:
        replay = PrioritizedReplay(16, FRAME, 2, seed=2)
        for k in range(20):
            replay.add(**row(k, 2 if full else 1 + k % 2))
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


@pytest.mark.parametrize("script", [FORK, FULL_DISK], ids=["a forked child is refused", "a full disk changes nothing"])
def test_in_a_process_of_its_own(script: str, tmp_path: Path) -> None:
    run_script(script, tmp_path / "frames")


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
import os, resource, signal, sys
import numpy as np
from rlv2v.replay import PrioritizedReplay

def buffer(turn):
    replay, frames = PrioritizedReplay(500, (16, 16, 3), 1), np.full((500, 16, 16, 3), turn, np.uint8)
    position = np.full(500, turn)
    replay.add(state=frames[:, None], action=frames, reward=np.zeros(500), true_frame=frames, position=position)
    return replay

def die_at_byte(number):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

def die_at_call(number):
    calls = []
    def hook(event, _):
        if event in ("open", "os.rename", "os.remove"):
            calls.append(event)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def turn_after(die, number):
    child = os.fork()
    if child == 0:
        replay = buffer(2)
        die(number)
        replay.save(path)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    loaded.load(path)
    batch = loaded.sample(200)
    turn = int(batch.positions[0])
    assert (batch.positions == turn).all() and (batch.states == turn).all()
    return turn, code

path = sys.argv[1]
old, loaded = buffer(1), buffer(0)
old.save(path)
for number in np.linspace(0, os.path.getsize(path) - 1, 50).astype(int).tolist():
    assert turn_after(die_at_byte, number) == (1, -signal.SIGXFSZ), number
turns = []
while not turns or turns[-1][1]:
    old.save(path)
    turns.append(turn_after(die_at_call, len(turns) + 1))
old, new, done = (1, -signal.SIGKILL), (2, -signal.SIGKILL), (2, 0)
assert turns == turns.count(old) * [old] + turns.count(new) * [new] + [done] and {*turns} == {old, new, done}, turns
print("done")
"""


def test_kills_during_save_leave_the_old_file_or_the_new(tmp_path: Path) -> None:
    """Kill a save at 50 bytes of the file, evenly spread, and before each call that opens or renames a file."""
    run_script(KILLS, tmp_path / "replay")
