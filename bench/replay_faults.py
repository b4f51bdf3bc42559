"""What replay buffers do in trouble: the same checks for every buffer that imports, ours included.

    python bench/replay_faults.py [NAME [CHECK ...]]

Each check runs in a process of its own, for at most 20 s, because some buffers crash or hang. A buffer's own remedy is
used where it documents one (`check_for_update` of cpprb, frame stacking of tianshou, trajectories of reverb).
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from replay_peers import MAKERS, Cpprb, available, load
from replay_rows import ADDED, ALPHA, BETA, DRAWN, Array, Payload, Peer

from rlv2v.replay import PrioritizedReplay

LIMIT_S = 20
STACK = 4
AHEAD = 8
"""Samples after which a buffer that draws ahead shows what was set."""
Outcome = tuple[str, bool | None]


class Stacked:
    """Use a small prioritised buffer whose states share frames; frame t has the value t % 251."""

    def __init__(self, name: str, capacity: int) -> None:
        module = importlib.import_module(MAKERS[name].module)
        self.name, self.module, one = name, module, {"shape": (1, STACK)}
        if name == "rlv2v":
            self.buffer: Any = PrioritizedReplay(capacity, (1,), STACK)
        elif name == "cpprb":
            fields = {"obs": one, "rew": {}, "done": {}}
            self.buffer = module.PrioritizedReplayBuffer(capacity, fields, next_of="obs", stack_compress="obs")
        else:
            shared = {"stack_num": STACK, "ignore_obs_next": True, "save_only_last_obs": True, "sample_avail": True}
            self.buffer = module.PrioritizedReplayBuffer(capacity, alpha=ALPHA, beta=BETA, **shared)

    def add(self, row: int, frames: Array, step: int, done: bool) -> None:
        """Add row `row`: the state is frames step .. step + STACK - 1 of the episode, the next state one frame on."""
        state, next_state = frames[step : step + STACK], frames[step + 1 : step + 1 + STACK]
        if self.name == "rlv2v":
            if step == 0:
                self.clip = self.buffer.put_clip(frames[:, None])
            following = (self.clip, step + STACK)
            shared = {"state": (self.clip, step, STACK), "action": following, "true_frame": following}
            self.buffer.add(**shared, reward=float(row), position=row, terminal=done)
        elif self.name == "cpprb":
            self.buffer.add(obs=state[None], next_obs=next_state[None], rew=float(row), done=float(done))
            if done:
                self.buffer.on_episode_end()
        else:
            ends = {"terminated": np.bool_(done), "truncated": np.bool_(False)}
            rows = {"obs": state, "obs_next": next_state, "act": np.uint8(0), "rew": np.float64(row), "info": {}}
            self.buffer.add(self.module.Batch(**rows, **ends))

    def sample(self) -> tuple[Array, Array, Array]:
        """Return rows, states and next states of 32 draws."""
        if self.name == "rlv2v":
            batch = self.buffer.sample(32)
            states = batch.states.numpy()[..., 0], batch.next_states.numpy()[:, 1:, 0]
            return batch.rewards.numpy(), *states
        if self.name == "cpprb":
            rows = self.buffer.sample(32)
            return rows["rew"].ravel(), rows["obs"][:, 0], rows["next_obs"][:, 0]
        rows, _ = self.buffer.sample(32)
        return rows.rew, rows.obs, rows.obs_next


def shared_frames(name: str, trials: int = 24) -> Outcome:
    """Check rows of overlapping states after every step once the ring has wrapped around.

    An episode begins with its first frame repeated, as frame stacks do; what follows a last step is not checked.
    """
    if name in ("torchrl", "reverb"):
        return f"n/a: {'keeps whole states' if name == 'torchrl' else 'frames go by trajectories, not by slots'}", None
    wrong = checked = bad_trials = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        capacity = int(rng.integers(8, 40))
        peer, expected, frame = Stacked(name, capacity), dict[int, tuple[Array, Array, bool]](), 0
        wrong_earlier = wrong
        for _ in range(int(rng.integers(4, 9))):
            length = int(rng.integers(5, 30))
            values = np.arange(frame, frame + length + 1)
            frames = (np.concatenate([[frame] * (STACK - 1), values]) % 251).astype(np.uint8)
            frame += length + 1
            for step in range(length):
                row, done = len(expected), step == length - 1
                expected[row] = frames[step : step + STACK], frames[step + 1 : step + 1 + STACK], done
                peer.add(row, frames, step, done)
                if row < capacity:
                    continue
                for reward, state, next_state in zip(*peer.sample(), strict=True):
                    right, right_next, last = expected[int(reward)]
                    checked += 1
                    wrong += not ((state == right).all() and (last or (next_state == right_next).all()))
        bad_trials += wrong > wrong_earlier
    return (f"wrong frames in {wrong} of {checked} rows, {bad_trials} of {trials} trials" if wrong else ""), not wrong


class GuardedCpprb(Cpprb):
    """Use cpprb's option against updates of rows that were overwritten since the sample."""

    options: ClassVar[dict[str, Any]] = {"check_for_update": True}


class ExactCpprb(Cpprb):
    """Use cpprb without the 1e-4 that it adds to priorities."""

    options: ClassVar[dict[str, Any]] = {"eps": 0.0}


def small(maker: type[Peer], capacity: int = 1024, frame: int = 16) -> Peer:
    """Return a full buffer of tiny rows, all of priority 1."""
    peer = maker(capacity, Payload((frame,), 1), False)
    peer.fill()
    return peer


def settled(peer: Peer) -> tuple[Any, Array, Array]:
    """Return `Peer.read` of a sample in which all that was set shows."""
    for _ in range(AHEAD):
        batch = peer.sample()
    return peer.read(batch)


def refusal(call: Callable[[], object]) -> str | None:
    """Return the name of what `call` raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


def far_index(name: str) -> Outcome:
    """Set a priority of a row far outside the buffer."""
    peer = small(MAKERS[name])
    refused = refusal(lambda: peer.update(np.array([10**12]), np.ones(1, np.float32)))
    if peer.wrong(peer.sample()).any():
        return "rows are wrong after it", False
    return f"refused ({refused})" if refused else "ignored", True


def nan_priority(name: str) -> Outcome:
    """Set NaN as the priority of one of the rows that were added last."""
    peer = small(MAKERS[name])
    ids, rows, _ = peer.read(peer.sample())
    newest = rows.argmax()
    refused = refusal(lambda: peer.update(ids[newest : newest + 1], np.full(1, np.nan, np.float32)))
    failed = refusal(lambda: settled(peer))
    if failed:
        return f"{'refused, but' if refused else 'taken;'} sample raises {failed}", False
    _, rows, weights = settled(peer)
    faults = ["NaN weights"] * bool(np.isnan(weights).any())
    if len(np.unique(rows)) < DRAWN // 4:  # of 1024 even rows 256 draws show 226
        faults.append(f"draws {len(np.unique(rows))} of {peer.capacity} rows for ever")
    if faults:
        return "taken; " + ", ".join(faults), False
    return f"refused ({refused})" if refused else "taken, and nothing else changes", True


def save_and_load(name: str) -> Outcome:
    """Compare what a saved buffer and one that loads it draw from the same seeds."""
    peer, other = small(MAKERS[name]), MAKERS[name](1024, Payload((16,), 1), False)
    ids, rows, _ = peer.read(peer.sample())
    peer.update(ids[:1], np.full(1, 1e6, np.float32))  # 80 of 100 draws
    settled(peer)
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
    torn, rows = torn_rows(small(MAKERS[name], frame=4096), 1.0)
    return (f"{torn} of {rows} rows are torn" if torn else ""), not torn


def stale_update(name: str) -> Outcome:
    """Set a priority of a sampled row that was overwritten since."""
    peer = small(GuardedCpprb if name == "cpprb" else MAKERS[name])
    ids, _, _ = peer.read(peer.sample())
    for _ in range(peer.capacity // ADDED):
        peer.add(peer.prepare(ADDED))
    peer.update(ids[:1], np.full(1, 1e6, np.float32))
    _, rows, _ = settled(peer)
    most = np.unique(rows, return_counts=True)[1].max()
    return ("the row in its place takes it", False) if most > DRAWN // 4 else ("", True)


def distribution(name: str, capacity: int = 2**20, draws: int = 2**22) -> Outcome:
    """Measure the relative error of P(i) over the million rows of priority 1e-4 among 2^16 of priority 1.

    With E_i = draws * P(i) and m such rows, sum (n_i - E_i)^2 / E_i has the mean m when P is right, and m * E_i * mse
    more if the errors' mean square is mse; its variance is at most m (2 + 1 / E_i). Wrong: 6 deviations. (In strata
    a row comes up at most once a sample: that takes 0.1% from the mean, a twentieth of the 6 deviations.)
    """
    if name == "reverb":
        return "n/a: a million rows take it minutes", None
    peer = small(ExactCpprb if name == "cpprb" else MAKERS[name], capacity)
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
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(check, name, theirs))
    process.start()
    theirs.close()
    outcome: Outcome = f"hangs: no end in {limit_s} s", False
    if ours.poll(limit_s):
        try:
            outcome = ours.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            outcome = (signal.strsignal(-code) or "").lower() if code < 0 else f"exit code {code}", False
    process.kill()
    process.join()
    return outcome


def report(check: Callable[[str], Outcome], name: str, pipe: Connection) -> None:
    """Send the outcome of a check, in its process."""
    faulthandler.disable()  # a crash is an outcome
    try:
        outcome = check(name)
    except Exception as error:
        outcome = f"raises {type(error).__name__}: {error}"[:120], False
    pipe.send(outcome)
    pipe.close()
    os._exit(0)  # without waiting for a server's threads


def fault_row(check: str, name: str, outcome: Outcome) -> dict[str, Any]:
    """Return the row of one check; `valid` is null where it does not apply."""
    text, valid = outcome
    row = {"case": f"fault, {check}", "backend": name, "ours": name == "rlv2v", "outcome": text or "right"}
    return row | {"valid": valid, "wrong_data": text if valid is False else None}


def fault_rows(names: Sequence[str], checks: Sequence[str] = tuple(CHECKS)) -> Iterator[dict[str, Any]]:
    """Yield a row for each check of each buffer, from one process a buffer: no crash goes further."""
    for name in names:
        command = [sys.executable, __file__, name, *checks]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 + LIMIT_S * len(checks))
        rows = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"case": "fault')]
        if len(rows) != len(checks):
            raise RuntimeError(f"{name}: {len(rows)} of {len(checks)} fault checks came back: {ended.stderr[-2000:]}")
        yield from rows


def main(name: str, checks: Sequence[str]) -> None:
    """Print the row of each check."""
    load(name)
    if name == "tianshou":
        small(MAKERS[name])  # compiles, once for all of its processes
    for check in checks:
        print(json.dumps(fault_row(check, name, isolated(CHECKS[check], name))), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:2] or available()[0]:
        main(wanted, sys.argv[2:] or tuple(CHECKS))
