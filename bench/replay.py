"""Prioritised replay against its peers: microseconds a call, bytes a transition, and where a peer's data is wrong.

    python bench/replay.py [--json F] [--quick]

One process, one thread, all buffers in turn, ten turns of one after ten of another. A turn is a learner's: add 64,
sample 256 with weights, update those 256, each timed alone (so that a tree that puts its work off pays for it in the
next call). `cold` sweeps the caches before every call. Peers come with `pip install -e '.[bench]'`; each must return
right rows before it is timed.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from machine import commit, machine, version

from rlv2v.cli import run_command
from rlv2v.errors import UserError
from rlv2v.replay import PrioritizedReplay

Array = npt.NDArray[Any]
BLOCK = 10
ADDED, DRAWN, ALPHA, BETA = 64, 256, 0.6, 0.4
FRAME, STATE = (64, 64, 3), 16


@dataclass(frozen=True)
class Args:
    """Time our replay buffer against others."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    quick: bool = False
    """A tenth of the capacity and of the repeats."""
    repeats: int = 200
    """Turns of each case with tiny payload; a tenth with video."""


class Peer(Protocol):
    """A buffer in a case. Row k of the stream has the value k % 251 in every byte of its payload."""

    def add(self, first: int, count: int) -> object: ...
    def sample(self) -> object: ...
    def update(self, priorities: Array) -> object: ...
    def check(self) -> str | None:
        """What is wrong with the rows of the last sample; None when they are right."""


class Payload:
    """Rows of `state` frames of `frame` bytes or floats; the first axis of each array is the row."""

    def __init__(self, frame: tuple[int, ...], state: int, dtype: Any) -> None:
        self.frame, self.state, self.dtype = frame, state, dtype

    def rows(self, first: int, count: int, frames: int | None = None) -> Array:
        values = (np.arange(first, first + count) % 251).astype(self.dtype)
        shape = self.frame if frames is None else (frames, *self.frame)
        return np.ascontiguousarray(np.broadcast_to(values.reshape(-1, *[1] * len(shape)), (count, *shape)))


class Ours:
    """Tiny: every frame given with its row. Video: 64 windows on a clip of 80 frames, the next frame as action."""

    def __init__(self, capacity: int, payload: Payload, video: bool) -> None:
        self.payload, self.video, self.given = payload, video, {}  # type: ignore[var-annotated]
        self.replay = PrioritizedReplay(capacity, payload.frame, payload.state, alpha=ALPHA, beta=BETA, seed=0)

    def prepare(self, first: int, count: int) -> None:
        position, reward = np.arange(first, first + count), np.arange(first, first + count).astype(np.float32)
        frames = self.payload.rows(first, count + STATE if self.video else count)
        states = None if self.video else self.payload.rows(first, count, self.payload.state)
        self.given[first] = (states, frames, position, reward)

    def add(self, first: int, count: int) -> object:
        states, frames, position, reward = self.given.pop(first)
        if states is not None:
            return self.replay.add(state=states, action=frames, reward=reward, true_frame=frames, position=position)
        clip, starts = self.replay.put_clip(frames), np.arange(count)
        following = (clip, starts + STATE)
        self.replay.add(
            state=(clip, starts, np.full(count, STATE)),
            action=following,
            reward=reward,
            true_frame=following,
            position=position,
        )
        clip.release()
        return clip

    def sample(self) -> object:
        self.batch = self.replay.sample(DRAWN)
        return self.batch

    def update(self, priorities: Array) -> object:
        return self.replay.update_priorities(self.batch.ids, priorities)

    def check(self) -> str | None:
        position = self.batch.positions
        offsets = torch.arange(self.payload.state) if self.video else torch.zeros(self.payload.state, dtype=torch.long)
        expected = ((position[:, None] + offsets) % 251).to(torch.uint8)
        right = (self.batch.states.flatten(2) == expected[..., None]).all() and (self.batch.rewards == position).all()
        return None if right and torch.equal(self.batch.ids, position) else "rows of another transition"

    def bytes_used(self) -> int:
        return self.replay.bytes_used


class Cpprb:
    """obs, next_obs, act, rew, done of cpprb.PrioritizedReplayBuffer, not compressed (see `compressed_is_wrong`)."""

    def __init__(self, capacity: int, payload: Payload, video: bool) -> None:
        cpprb = importlib.import_module("cpprb")
        self.payload, self.given = payload, {}  # type: ignore[var-annotated]
        self.shape = (payload.state, *payload.frame) if video else payload.frame
        kind = {"shape": self.shape, "dtype": payload.dtype}
        act = {"shape": payload.frame, "dtype": payload.dtype}
        fields = {"obs": kind, "next_obs": kind, "act": act, "rew": {}, "done": {}}
        self.buffer = cpprb.PrioritizedReplayBuffer(capacity, fields, alpha=ALPHA)

    def prepare(self, first: int, count: int) -> None:
        obs = self.payload.rows(first, count, self.payload.state).reshape(count, *self.shape)
        rew = np.arange(first, first + count).astype(np.float32)
        self.given[first] = {
            "obs": obs,
            "next_obs": obs,
            "act": self.payload.rows(first, count),
            "rew": rew,
            "done": 0 * rew,
        }

    def add(self, first: int, count: int) -> object:
        return self.buffer.add(**self.given.pop(first))

    def sample(self) -> object:
        self.batch = self.buffer.sample(DRAWN, beta=BETA)
        return self.batch

    def update(self, priorities: Array) -> object:
        return self.buffer.update_priorities(self.batch["indexes"], priorities)

    def check(self) -> str | None:
        obs, rew = self.batch["obs"].reshape(DRAWN, -1), self.batch["rew"].reshape(-1, 1)
        return None if (obs == rew % 251).all() else "rows of another transition"

    def bytes_used(self) -> int:
        arrays = self.buffer.get_all_transitions()
        return sum(array.nbytes for array in arrays.values())


class Tianshou:
    """tianshou.data.PrioritizedReplayBuffer; a batch goes in row by row, the only way that its buffer takes it."""

    def __init__(self, capacity: int, payload: Payload, video: bool) -> None:
        data = importlib.import_module("tianshou.data")
        self.data, self.payload, self.given = data, payload, {}  # type: ignore[var-annotated]
        self.shape = (payload.state, *payload.frame) if video else payload.frame
        self.buffer = data.PrioritizedReplayBuffer(capacity, alpha=ALPHA, beta=BETA)

    def prepare(self, first: int, count: int) -> None:
        obs = self.payload.rows(first, count, self.payload.state).reshape(count, *self.shape)
        act, rew = self.payload.rows(first, count), np.arange(first, first + count).astype(np.float32)
        never = np.zeros(1, bool)
        self.given[first] = [
            self.data.Batch(
                obs=obs[k], act=act[k], rew=rew[k], terminated=never[0], truncated=never[0], obs_next=obs[k], info={}
            )
            for k in range(count)
        ]

    def add(self, first: int, count: int) -> object:
        return [self.buffer.add(row) for row in self.given.pop(first)]

    def sample(self) -> object:
        self.batch, self.indices = self.buffer.sample(DRAWN)
        return self.batch

    def update(self, priorities: Array) -> object:
        return self.buffer.update_weight(self.indices, priorities)

    def check(self) -> str | None:
        obs, rew = self.batch.obs.reshape(DRAWN, -1), self.batch.rew.reshape(-1, 1)
        return None if (obs == rew % 251).all() else "rows of another transition"

    def fill(self, capacity: int) -> None:
        """Row by row a million take minutes: one row makes the arrays, the others are written into them."""
        self.prepare(0, 1)
        self.add(0, 1)
        meta = self.buffer._meta
        for first in range(0, capacity, 65536):
            count = min(65536, capacity - first)
            part = slice(first, first + count)
            meta.obs[part] = meta.obs_next[part] = self.payload.rows(first, count, self.payload.state).reshape(
                count, *self.shape
            )
            meta.act[part], meta.rew[part] = self.payload.rows(first, count), np.arange(first, first + count)
        self.buffer._size, self.buffer._insertion_idx = capacity, 0
        self.buffer.weight[np.arange(capacity)] = np.ones(capacity)

    def bytes_used(self) -> int:
        arrays = [value for value in self.buffer._meta.values() if isinstance(value, np.ndarray)]
        return sum(array.nbytes for array in arrays) + self.buffer.weight._value.nbytes


MAKERS: dict[str, Any] = {"rlv2v": Ours, "cpprb": Cpprb, "tianshou": Tianshou}


def available() -> tuple[list[str], dict[str, str]]:
    """The buffers to time, and why others are not; of torchrl the compiled part counts, which its sampler needs."""
    names, missing = ["rlv2v"], {}
    for name, module in (
        ("cpprb", "cpprb"),
        ("tianshou", "tianshou.data"),
        ("torchrl", "torchrl._torchrl"),
        ("reverb", "reverb"),
    ):
        try:
            importlib.import_module(module)
        except Exception as error:
            said = re.sub(r"/\S*/", "", str(error).splitlines()[0])  # without the folders of this machine
            missing[name] = f"{type(error).__name__}: {said}"
        else:
            if name in MAKERS:
                names.append(name)
            else:
                missing[name] = "imports here, but this bench has no adapter for it yet"
    return names, missing


def compressed_is_wrong(trials: int) -> int | None:
    """In how many random trials cpprb with next_of and stack_compress returns wrong frames after wraparound."""
    if version("cpprb") is None:
        return None
    cpprb = importlib.import_module("cpprb")
    wrong = 0
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        capacity, stack = int(rng.integers(8, 40)), 4
        fields = {"obs": {"shape": (1, stack)}, "rew": {}, "done": {}}
        buffer = cpprb.ReplayBuffer(capacity, fields, next_of="obs", stack_compress="obs")
        time_step = 0
        for _ in range(int(rng.integers(2, 8))):
            length = int(rng.integers(5, 30))
            for k in range(length):
                window = np.arange(time_step + k, time_step + k + stack, dtype=float)[None]
                done = float(k == length - 1)
                buffer.add(obs=window, next_obs=window + 1, rew=float(time_step + k), done=done)
            buffer.on_episode_end()
            time_step += length + stack
        rows = buffer.get_all_transitions()
        expected = rows["rew"].reshape(-1, 1) + np.arange(stack)
        right = (rows["obs"].reshape(-1, stack) == expected).all()
        right = right and (rows["next_obs"].reshape(-1, stack) == expected + 1).all()
        wrong += not right
    return wrong


def build(name: str, capacity: int, payload: Payload, video: bool) -> Any:
    """A full buffer with random priorities."""
    peer = MAKERS[name](capacity, payload, video)
    if isinstance(peer, Tianshou):
        peer.fill(capacity)
    else:
        for first in range(0, capacity, ADDED if video else 65536):
            count = min(ADDED if video else 65536, capacity - first)
            peer.prepare(first, count)
            peer.add(first, count)
    rng = np.random.default_rng(0)
    for _ in range(min(capacity // DRAWN, 500)):
        peer.sample()
        peer.update((rng.random(DRAWN) + 1e-3).astype(np.float32))
    wrong = peer.check()
    if wrong is not None:
        raise UserError(f"{name}: {wrong} before anything was timed")
    return peer


def sweep(memory: Array) -> None:
    memory += 1


def turns(peers: dict[str, Any], capacity: int, repeats: int, cold: bool) -> dict[str, dict[str, list[float]]]:
    """Microseconds of add, sample and update of each buffer, one turn of each after the other."""
    times: dict[str, dict[str, list[float]]] = {name: {"add": [], "sample": [], "update": []} for name in peers}
    memory, rng = np.zeros(2**26, np.uint8), np.random.default_rng(1)
    for block in range(0, repeats, BLOCK):
        priorities = (rng.random(DRAWN) + 1e-3).astype(np.float32)
        for turn, (name, peer) in [(turn, item) for item in peers.items() for turn in range(block, block + BLOCK)]:
            first = peer.next_row = getattr(peer, "next_row", capacity)
            peer.next_row += ADDED
            peer.prepare(first, ADDED)
            calls: dict[str, Callable[[], object]] = {
                "add": functools.partial(peer.add, first, ADDED),
                "sample": peer.sample,
                "update": functools.partial(peer.update, priorities),
            }
            for call, run in calls.items():
                if cold:
                    sweep(memory)
                began = time.perf_counter_ns()
                run()
                if cold or turn % BLOCK:  # the first of a block finds the others' data in the caches
                    times[name][call].append((time.perf_counter_ns() - began) / 1e3)
    return times


def rows_of(
    case: str, times: dict[str, dict[str, list[float]]], peers: dict[str, Any], wrong: dict[str, str]
) -> list[Any]:
    """Rows of one case; prints its lines of the table."""
    rows = []
    for call in ("sample", "update", "add"):
        ours = statistics.median(times["rlv2v"][call])
        for name in peers:
            p20, p50, p80 = statistics.quantiles(times[name][call], n=10)[1::3]
            ratios = {peer: round(statistics.median(times[peer][call]) / p50, 2) for peer in peers if peer != name}
            fault = peers[name].check() or wrong.get(name)
            row: dict[str, Any] = {
                "case": case,
                "backend": name,
                "pass": call,
                "dtype": "uint8",
                "median_us": round(p50, 2),
            }
            row |= {"p20_us": round(p20, 2), "p80_us": round(p80, 2), "percent_of_limit": None, "speedup_over": ratios}
            rows.append(row | {"valid": peers[name].check() is None, "wrong_data": fault})
            figures = f"{p50:10.1f} {p20:10.1f} {p80:10.1f} | {p50 / ours:7.2f}"
            print(f"{case:14} | {call:6} | {name:8} | {figures} | {fault or ''}", flush=True)
    return rows


def memory_rows(quick: bool) -> list[dict[str, Any]]:
    """Bytes a transition of a video buffer filled once; windows on videos of 528 frames, action: next or new frame."""
    capacity, rows = 512 if quick else 4096, []
    for case, new_action in (("overlapping states", False), ("a new action frame each", True)):
        replay = PrioritizedReplay(capacity, FRAME, STATE)
        starts = np.arange(512)
        for _ in range(capacity // 512):
            clip = replay.put_clip(np.zeros((512 + STATE, *FRAME), np.uint8))
            following = (clip, starts + STATE)
            replay.add(
                state=(clip, starts, np.full(512, STATE)),
                action=np.zeros((512, *FRAME), np.uint8) if new_action else following,
                reward=np.zeros(512, np.float32),
                true_frame=following,
                position=starts,
            )
            clip.release()
        each = replay.bytes_used / capacity
        rows.append({"case": f"memory, {case}", "backend": "rlv2v", "bytes_per_transition": round(each)})
        print(f"memory, {case}: {each / 1e3:.2f} KB a transition, {each / np.prod(FRAME):.3f} frames")
    return rows


def threads_row(case: str, replay: PrioritizedReplay, rounds: int, repeats: int) -> dict[str, Any]:
    """Rate of two sampling threads over that of one, `rounds` samples of 256 each; medians of alternating runs."""

    def work() -> None:
        for _ in range(rounds):
            batch = replay.sample(DRAWN)  # held until the next is there, as a learner does
        del batch

    def run(threads: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
        return threads * rounds / (time.perf_counter() - began)

    rates = [(run(1), run(2)) for _ in range(repeats)]
    ratio = statistics.median(two / one for one, two in rates)
    print(f"2 threads, {case}: {ratio:.2f} x the rate of one (median of {repeats})")
    return {"case": f"2 threads, {case}", "backend": "rlv2v", "ratio": round(ratio, 3)}


def save_row(replay: PrioritizedReplay) -> dict[str, Any]:
    """Milliseconds to save and load, and whether the next 100 samples are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path, saves = Path(folder) / "replay", []
        for _ in range(5):
            began = time.perf_counter()
            replay.save(path)
            saves.append((time.perf_counter() - began) * 1e3)
        size, began = path.stat().st_size, time.perf_counter()
        other = PrioritizedReplay(replay.capacity, replay.frame_shape, replay.max_len)
        other.load(path)
        load = (time.perf_counter() - began) * 1e3
    same = all(
        all(torch.equal(a, b) for a, b in zip(replay.sample(DRAWN), other.sample(DRAWN), strict=True))
        for _ in range(100)
    )
    row = {"case": f"save {len(replay)} transitions", "backend": "rlv2v", "save_ms": round(statistics.median(saves), 1)}
    print(f"save {len(replay)} transitions, {size / 1e6:.0f} MB: {row['save_ms']} ms, load {load:.0f} ms, same: {same}")
    return row | {"load_ms": round(load, 1), "megabytes": round(size / 1e6, 1), "valid": same}


def main(args: Args) -> None:
    """Check, time, print the tables and the JSON line; exit code 1 when a buffer of ours returned a wrong row."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if args.repeats < 20:
        raise UserError(f"--repeats: expected at least 20, got {args.repeats}")
    torch.set_num_threads(1)
    names, missing = available()
    for name, why in missing.items():
        print(f"{name}: not measured, {why}")
    trials, wrong = 200, {}
    found = compressed_is_wrong(trials)
    if found:
        wrong["cpprb"] = f"with next_of and stack_compress, in {found} of {trials} trials"

    scale = 10 if args.quick else 1
    print("case | call | buffer | us p50 p20 p80 | x ours | wrong data")
    capacity, payload = 1_000_000 // scale, Payload((16,), 1, np.uint8)
    peers = {name: build(name, capacity, payload, False) for name in names}
    rows: list[dict[str, Any]] = []
    for case, cold in (("tiny", False), ("tiny, cold", True)):
        repeats = args.repeats // scale + 20
        rows += rows_of(case, turns(peers, capacity, repeats // 4 + 20 if cold else repeats, cold), peers, wrong)
    for name, peer in peers.items():
        each = peer.bytes_used() / capacity
        rows.append({"case": "memory, tiny", "backend": name, "bytes_per_transition": round(each, 1)})
        print(f"memory, tiny: {name} {each:.1f} bytes a transition")
    rows.append(save_row(peers["rlv2v"].replay))
    rows.append(threads_row("tiny", peers["rlv2v"].replay, 3000 // scale, 5))
    del peers

    capacity, payload = 4096 // (8 if args.quick else 1), Payload(FRAME, STATE, np.uint8)
    peers = {name: build(name, capacity, payload, True) for name in names}
    rows += rows_of("video", turns(peers, capacity, max(args.repeats // scale // 10, 10), False), peers, wrong)
    rows.append(threads_row("video", peers["rlv2v"].replay, 20 // min(scale, 4), 5))
    for name, peer in peers.items():
        each = peer.bytes_used() / capacity
        rows.append({"case": "memory, video", "backend": name, "bytes_per_transition": round(each)})
        print(f"memory, video: {name} {each / 1e3:.1f} KB a transition")
    del peers
    rows += memory_rows(args.quick)

    text = json.dumps({"bench": "replay", "commit": commit(), "machine": machine(1), "missing": missing, "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if not all(row.get("valid", True) for row in rows if row["backend"] == "rlv2v"):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
