"""What replay buffers do in trouble: the same checks for every buffer that imports, ours included.

Each check runs in a process of its own, for at most 60 s, because some buffers crash or hang. A buffer's own remedy is
used where it documents one (`check_for_update` of cpprb, frame stacking of tianshou).
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, fault_of
from replay_peers import ADDED, ALPHA, BETA, DRAWN, MAKERS, Array, Payload, Peer

from rlv2v.replay import PrioritizedReplay

LIMIT_S = 60
STACK = 4
Outcome = tuple[str, bool | None]
Samples = tuple[Array, Array, Array]
Stack = tuple[Callable[..., object], Callable[[], Samples]]
"""Add (row, frames, step, done), whose state is frames step .. step + STACK - 1 and whose next state is one frame on;
return rows, states and next states of 32 draws."""


def windows(frames: Array, step: int) -> tuple[Array, Array]:
    """Return the state and the next state of a step."""
    return frames[step : step + STACK], frames[step + 1 : step + 1 + STACK]


def stacked_rlv2v(capacity: int) -> Stack:
    """Refer to the frames of one clip an episode."""
    replay, clips = PrioritizedReplay(capacity, (1,), STACK), list[Any]()

    def add(row: int, frames: Array, step: int, done: bool) -> None:
        if step == 0:
            clips[:] = [replay.put_clip(frames[:, None])]
        following = (clips[0], step + STACK)
        shared = {"state": (clips[0], step, STACK), "action": following, "true_frame": following}
        replay.add(**shared, reward=float(row), position=row, terminal=done)

    def sample() -> Samples:
        batch = replay.sample(32)
        return batch.rewards.numpy(), batch.states.numpy()[..., 0], batch.next_states.numpy()[:, 1:, 0]

    return add, sample


def stacked_cpprb(capacity: int) -> Stack:
    """Use `stack_compress` and `next_of`."""
    fields = {"obs": {"shape": (1, STACK)}, "rew": {}, "done": {}}
    kind = importlib.import_module("cpprb").PrioritizedReplayBuffer
    buffer = kind(capacity, fields, next_of="obs", stack_compress="obs")

    def add(row: int, frames: Array, step: int, done: bool) -> None:
        state, next_state = windows(frames, step)
        buffer.add(obs=state[None], next_obs=next_state[None], rew=float(row), done=float(done))
        if done:
            buffer.on_episode_end()

    def sample() -> Samples:
        rows = buffer.sample(32)
        return rows["rew"].ravel(), rows["obs"][:, 0], rows["next_obs"][:, 0]

    return add, sample


def stacked_tianshou(capacity: int) -> Stack:
    """Use `stack_num`, and next states from the row that follows."""
    data = importlib.import_module("tianshou.data")
    shared = {"stack_num": STACK, "ignore_obs_next": True, "save_only_last_obs": True, "sample_avail": True}
    buffer = data.PrioritizedReplayBuffer(capacity, alpha=ALPHA, beta=BETA, **shared)

    def add(row: int, frames: Array, step: int, done: bool) -> None:
        state, next_state = windows(frames, step)
        rows = {"obs": state, "obs_next": next_state, "act": np.uint8(0), "rew": np.float64(row), "info": {}}
        buffer.add(data.Batch(**rows, terminated=np.bool_(done), truncated=np.bool_(False)))

    def sample() -> Samples:
        rows, _ = buffer.sample(32)
        return rows.rew, rows.obs, rows.obs_next

    return add, sample


STACKED = {"rlv2v": stacked_rlv2v, "cpprb": stacked_cpprb, "tianshou": stacked_tianshou}


def shared_frames(name: str, trials: int = 24) -> Outcome:
    """Check rows of overlapping states after every step once the ring has wrapped around.

    An episode begins with its first frame repeated, as frame stacks do; what follows a last step is not checked.
    """
    if name not in STACKED:
        return "n/a: keeps whole states", None
    wrong = checked = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        capacity = int(rng.integers(8, 40))
        (add, sample), expected, frame = STACKED[name](capacity), dict[int, tuple[Array, Array, bool]](), 0
        for _ in range(int(rng.integers(4, 9))):
            length = int(rng.integers(5, 30))
            values = np.arange(frame, frame + length + 1)
            frames = (np.concatenate([[frame] * (STACK - 1), values]) % 251).astype(np.uint8)
            frame += length + 1
            for step in range(length):
                row, done = len(expected), step == length - 1
                expected[row] = *windows(frames, step), done
                add(row, frames, step, done)
                for reward, state, next_state in zip(*sample(), strict=True) if row >= capacity else ():
                    right, right_next, last = expected[int(reward)]
                    checked += 1
                    wrong += not ((state == right).all() and (last or (next_state == right_next).all()))
    return (f"wrong frames in {wrong} of {checked} rows" if wrong else ""), not wrong


def small(name: str, capacity: int = 1024, frame: int = 16, **options: Any) -> Peer:
    """Return a full buffer of tiny rows, all of priority 1."""
    peer = MAKERS[name](capacity, Payload((frame,)), **options)
    peer.fill()
    return peer


def refusal(call: Callable[[], object]) -> str | None:
    """Return the name of what `call` raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


def far_index(name: str) -> Outcome:
    """Set a priority of a row far outside the buffer."""
    peer = small(name)
    refused = refusal(lambda: peer.update(np.array([10**12]), np.ones(1, np.float32)))
    if peer.wrong(peer.sample()).any():
        return "rows are wrong after it", False
    return f"refused ({refused})" if refused else "ignored", True


def nan_priority(name: str) -> Outcome:
    """Set NaN as the priority of one of the rows that were added last."""
    peer = small(name)
    ids, rows, _ = peer.read(peer.sample())
    newest = rows.argmax()
    refused = refusal(lambda: peer.update(ids[newest : newest + 1], np.full(1, np.nan, np.float32)))
    failed = refusal(peer.sample)
    if failed:
        return f"{'refused, but' if refused else 'taken;'} sample raises {failed}", False
    _, rows, weights = peer.read(peer.sample())
    faults = ["NaN weights"] * bool(np.isnan(weights).any())
    if len(np.unique(rows)) < DRAWN // 4:  # of 1024 even rows 256 draws show 226
        faults.append(f"draws {len(np.unique(rows))} of {peer.capacity} rows for ever")
    if faults:
        return "taken; " + ", ".join(faults), False
    return f"refused ({refused})" if refused else "taken, and nothing else changes", True


def save_and_load(name: str) -> Outcome:
    """Compare what a saved buffer and one that loads it draw from the same seeds."""
    peer, other = small(name), MAKERS[name](1024, Payload((16,)))
    ids, rows, _ = peer.read(peer.sample())
    peer.update(ids[:1], np.full(1, 1e6, np.float32))  # 80 of 100 draws
    with tempfile.TemporaryDirectory() as folder:
        peer.save(Path(folder) / "replay")
        other.load(Path(folder) / "replay")
        drawn = []
        for buffer in (peer, other):
            np.random.seed(0)
            torch.manual_seed(0)
            drawn.append([buffer.sample() for _ in range(20)])
    saved, loaded = (np.stack([peer.read(batch)[1] for batch in batches]) for batches in drawn)
    if any(other.wrong(batch).any() for batch in drawn[1]):
        return "rows are wrong", False
    if (loaded == rows[0]).mean() < 0.5:
        return "priorities are lost", False
    return ("", True) if np.array_equal(saved, loaded) else ("priorities are kept, the next samples differ", False)


def torn_rows(peer: Peer, seconds: float) -> tuple[int, int]:
    """Return the rows that mix transitions, of those that 2 threads draw while a third adds and updates."""
    end, priorities = time.monotonic() + seconds, np.full(DRAWN, 0.5, np.float32)

    def draw() -> tuple[int, int]:
        torn = rows = 0
        while time.monotonic() < end:
            wrong = peer.wrong(peer.sample())
            torn, rows = torn + int(wrong.sum()), rows + len(wrong)
        return torn, rows

    def write() -> tuple[int, int]:
        while time.monotonic() < end:
            peer.add(peer.prepare(ADDED))
            ids, _, _ = peer.read(peer.sample())
            peer.update(ids, priorities)
        return 0, 0

    peer.sample()
    with ThreadPoolExecutor(3) as pool:
        threads = [pool.submit(work) for work in (draw, draw, write)]
        counts = [thread.result() for thread in threads]
    return sum(torn for torn, _ in counts), sum(rows for _, rows in counts)


def threads(name: str) -> Outcome:
    """Sample with 2 threads beside one that adds and updates, a second; they take turns every 0.1 ms."""
    sys.setswitchinterval(1e-4)
    torn, rows = torn_rows(small(name, frame=4096), 1.0)
    return (f"{torn} of {rows} rows are torn" if torn else ""), not torn


def stale_update(name: str) -> Outcome:
    """Set a priority of a sampled row that was overwritten since."""
    peer = small(name, **({"check_for_update": True} if name == "cpprb" else {}))
    ids, _, _ = peer.read(peer.sample())
    for _ in range(peer.capacity // ADDED):
        peer.add(peer.prepare(ADDED))
    peer.update(ids[:1], np.full(1, 1e6, np.float32))
    _, rows, _ = peer.read(peer.sample())
    most = np.unique(rows, return_counts=True)[1].max()
    return ("the row in its place takes it", False) if most > DRAWN // 4 else ("", True)


def distribution(name: str, capacity: int = 2**20, draws: int = 2**22) -> Outcome:
    """Measure the relative error of P(i) over the million rows of priority 1e-4 among 2^16 of priority 1.

    With E_i = draws * P(i) and m such rows, sum (n_i - E_i)^2 / E_i has the mean m when P is right, and m * E_i * mse
    more if the errors' mean square is mse; its variance is at most m (2 + 1 / E_i). Wrong: 6 deviations. (In strata
    a row comes up at most once a sample: that takes 0.1% from the mean, a twentieth of the 6 deviations.)
    """
    options: dict[str, Any] = {"eps": 0.0} if name == "cpprb" else {}  # else it adds 1e-4 to priorities
    peer = small(name, capacity, **options)
    low = np.random.default_rng(0).permutation(capacity) >= 2**16
    priorities = np.where(low, 1e-4, 1).astype(np.float32)
    peer.update(np.arange(capacity), priorities)
    counts, at_once = np.zeros(capacity), 2**14
    for _ in range(draws // at_once):
        counts += np.bincount(peer.read(peer.sample(at_once))[1].astype(np.int64), minlength=capacity)
    powers = priorities.astype(np.float64) ** ALPHA
    expected, rows = draws * powers[low].max() / powers.sum(), low.sum()
    mse = (((counts[low] - expected) ** 2).sum() / expected - rows) / (expected * rows)
    noise = 6 * np.sqrt((2 + 1 / expected) / rows) / expected
    if mse > noise:
        return f"P of low priorities is off by {np.sqrt(mse):.0%} (root mean square)", False
    return f"no error of P above {np.sqrt(noise):.0%}", True


CHECKS: dict[str, Callable[[str], Outcome]] = {
    "shared frames": shared_frames,
    "far index": far_index,
    "NaN priority": nan_priority,
    "save and load": save_and_load,
    "threads": threads,
    "stale update": stale_update,
    "distribution": distribution,
}


def isolated(check: Callable[[str], Outcome], name: str, limit_s: float = LIMIT_S) -> Outcome:
    """Return the check's outcome, or how its process ended."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def report() -> None:
        faulthandler.disable()  # a crash is an outcome
        try:
            theirs.send(check(name))
        except Exception as error:
            theirs.send((f"raises {fault_of(error)}"[:120], False))
        os._exit(0)  # without waiting for a buffer's threads

    process = context.Process(target=report)
    process.start()
    process.join(limit_s)
    if process.exitcode is None:
        process.kill()
        return f"hangs: no end in {limit_s} s", False
    if process.exitcode < 0:
        return str(signal.strsignal(-process.exitcode)).lower(), False
    outcome: Outcome = ours.recv() if ours.poll() else (f"exit code {process.exitcode}", False)
    return outcome


def fault_rows(names: Sequence[str], checks: Sequence[str] = tuple(CHECKS)) -> Iterator[Row]:
    """Yield a row for each check of each buffer; `valid` is null where it does not apply."""
    if "tianshou" in names:
        small("tianshou")  # compiles, once for all of its checks
    for name in names:
        for check in checks:
            text, valid = isolated(CHECKS[check], name)
            row: Row = {"case": f"fault, {check}", "backend": name, "ours": name == "rlv2v", "outcome": text or "right"}
            yield row | {"valid": valid, "wrong_data": text if valid is False else None}
