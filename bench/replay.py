"""Time prioritised replay beside its peers, count bytes a transition, and say where a buffer's data is wrong.

    python bench/replay.py [--json F] [--quick]

First what each buffer does in trouble (replay_faults). Then one thread, all buffers in turn, a block of turns each. A
turn is a learner's: add 64, sample 256 with weights, update those 256, each timed alone; `add 1` adds one row. The
first fifth of a block warms the caches and is not timed; `cold` sweeps the caches before every call instead. The limit
of a video sample is a copy of as many bytes, outside the caches. Peers come with `pip install -e '.[bench]'`, torchrl
where it imports. reverb no longer installs; bench/results/replay-reverb.json keeps its last comparison.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bench, Contender, Row, TimedArgs, copy_limit, rows_of, wall_us
from replay_faults import CHECKS, fault_rows
from replay_peers import ADDED, DRAWN, FRAME, MAKERS, STATE, Payload, Peer, available

from rlv2v.cli import run_command
from rlv2v.errors import UserError
from rlv2v.replay import PrioritizedReplay

CALLS = ("sample", "update", "add", "add 1")
COPY_BYTES = 2**28
"""Of the copy that is the limit of a video sample: outside the caches."""
Times = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time our replay buffer against others."""

    rounds: int = 6
    """Blocks of turns of each buffer."""


def random_priorities(rng: np.random.Generator) -> Any:
    """Return priorities of a sample."""
    return (rng.random(DRAWN) + 1e-3).astype(np.float32)


def build(name: str, capacity: int, payload: Payload) -> Peer:
    """Return a full buffer with random priorities that returned right rows."""
    peer, rng = MAKERS[name](capacity, payload), np.random.default_rng(0)
    peer.fill()
    for _ in range(min(capacity // DRAWN, 500)):
        ids, _, _ = peer.read(peer.sample())
        peer.update(ids, random_priorities(rng))
    num_wrong = peer.wrong(peer.sample()).sum()
    if num_wrong:
        raise UserError(f"{name}: {num_wrong} of {DRAWN} rows are wrong before anything was timed")
    return peer


def time_turns(peers: dict[str, Peer], blocks: int, size: int, cold: bool) -> tuple[Times, dict[str, Any]]:
    """Return the microseconds of each call of each buffer in blocks of `size` turns, and its last batch.

    A row is added alone (`add 1`) with tiny payload only: windows of video come with their clip.
    """
    times: Times = {name: {call: [] for call in CALLS} for name in peers}
    memory, rng, batches = np.zeros(2**26, np.uint8), np.random.default_rng(1), dict[str, Any]()

    def timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        if cold:
            np.add(memory, 1, out=memory)
        start = time.perf_counter_ns()
        result = call(*args)
        return (time.perf_counter_ns() - start) / 1e3, result

    for _ in range(blocks):
        for name, peer in peers.items():
            batches.pop(name, None)
            for turn in range(size):
                rows, priorities = peer.prepare(ADDED), random_priorities(rng)
                us = {"add": timed(peer.add, rows)[0]}
                if not peer.payload.video:
                    us["add 1"], _ = timed(peer.add, peer.prepare(1))
                us["sample"], batch = timed(peer.sample)  # the last batch is held until this one exists
                us["update"], _ = timed(peer.update, peer.read(batch)[0], priorities)
                if cold or turn >= size // 5:
                    for call, value in us.items():
                        times[name][call].append(value)
            batches[name] = batch
    return times, batches


def timing_rows(case: str, peers: dict[str, Peer], times: Times, batches: dict[str, Any]) -> list[Row]:
    """Return and print the rows of one case; the samples of video have the limit of a copy."""
    rows, video = [], any(peer.payload.video for peer in peers.values())
    num_wrong = {name: int(peer.wrong(batches[name]).sum()) for name, peer in peers.items()}
    for call in [call for call in CALLS if all(times[name][call] for name in peers)]:
        limited, contenders = video and call == "sample", []
        for name, peer in peers.items():
            num_bytes = sum(array.nbytes for array, _ in peer.parts(batches[name]))
            wrong = f"{num_wrong[name]} of {DRAWN} rows" if num_wrong[name] else None
            contender = Contender(
                name,
                dtype="uint8",
                work={"gb_s": 2.0 * num_bytes} if limited else {},
                ours=name == "rlv2v",
                valid=wrong is None,
                fields={"wrong_data": wrong},
            )
            contenders.append(contender)
        by_key = {contender.key: times[contender.name][call] for contender in contenders}
        if limited:
            copy = copy_limit(2 * COPY_BYTES, "uint8")
            contenders.append(copy)
            by_key[copy.key] = [wall_us(copy.call) for _ in range(5)]
        rows += rows_of(case, call, contenders, by_key)
    return rows


def memory_rows(capacity: int) -> list[Row]:
    """Return the memory of a video buffer that was filled once, 512 windows a video.

    Each window is one frame on, with the next frame of the video as action or a frame of its own; or each starts where
    the last one's action was, so that no two share a frame but that.
    """
    rows, windows = [], 512
    for case, stride, new_action, size in (
        ("overlapping states", 1, False, capacity),
        ("overlapping states, a new action frame each", 1, True, capacity),
        ("states apart", STATE, False, max(windows, capacity // 4)),
    ):
        replay, starts = PrioritizedReplay(size, FRAME, STATE), stride * np.arange(windows)
        following = starts + STATE
        for _ in range(size // windows):
            clip = replay.put_clip(np.zeros((following[-1] + 1, *FRAME), np.uint8))
            replay.add(
                state=(clip, starts, np.full(windows, STATE)),
                action=np.zeros((windows, *FRAME), np.uint8) if new_action else (clip, following),
                reward=np.zeros(windows, np.float32),
                true_frame=(clip, following),
                position=starts,
            )
            clip.release()
        each = round(replay.bytes_used / size)
        rows.append({"case": f"memory, {case}", "backend": "rlv2v", "bytes_per_transition": each})
    return rows


def thread_row(case: str, peer: Peer, samples: int, repeats: int = 15) -> Row:
    """Return the rate of two sampling threads over one's.

    It is measured in turns with what the cores give two threads that hash what fits the caches.
    """
    hashed = np.zeros(2**19, np.uint8)

    def sampling(count: int) -> None:
        for _ in range(count):
            batch = peer.sample()  # held until the next one exists, as a learner does
        del batch

    def hashing(count: int) -> None:
        for _ in range(count):
            hashlib.sha256(hashed.data)

    def rate(work: Callable[[int], None], threads: int, count: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            us = wall_us(lambda: list(pool.map(work, [count] * threads)))
        return threads * count / us

    ratios: dict[str, list[float]] = {"sampling": [], "hashing": []}
    for _ in range(repeats):
        for work, count in ((sampling, samples), (hashing, 500)):
            ratios[work.__name__].append(rate(work, 2, count) / rate(work, 1, count))
    ratio, limit = (round(statistics.median(values), 3) for values in ratios.values())
    return {"case": f"2 threads, {case}", "backend": "rlv2v", "ratio": ratio, "limit": limit}


def save_row(replay: PrioritizedReplay) -> Row:
    """Return the milliseconds to save and load, and whether the next 100 samples are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay"
        save_ms = statistics.median(wall_us(lambda: replay.save(path)) / 1e3 for _ in range(9))
        size, other = path.stat().st_size, PrioritizedReplay(replay.capacity, replay.frame_shape, replay.max_len)
        load_ms = wall_us(lambda: other.load(path)) / 1e3
    same = all(
        all(torch.equal(a, b) for a, b in zip(replay.sample(DRAWN), other.sample(DRAWN), strict=True))
        for _ in range(100)
    )
    row: Row = {"case": f"save {len(replay)} transitions", "backend": "rlv2v", "ours": True, "valid": same}
    return row | {"save_ms": round(save_ms, 1), "load_ms": round(load_ms, 1), "megabytes": round(size / 1e6, 1)}


def payload_rows(names: list[str], args: Args, video: bool) -> list[Row]:
    """Build, time and count all buffers with one kind of payload."""
    quick, case = args.quick, "video" if video else "tiny"
    if video:
        payload, capacity, samples = Payload(FRAME, STATE), 512 if quick else 4096, 10 if quick else 20
        turns = [("video", 10, False)]
    else:
        payload, capacity, samples = Payload((16,)), 100_000 if quick else 1_000_000, 200 if quick else 2000
        turns = [("tiny", 50, False), ("tiny, cold", 10 if quick else 20, True)]
    peers, rows = {name: build(name, capacity, payload) for name in names}, list[Row]()
    for label, size, cold in turns:
        rows += timing_rows(label, peers, *time_turns(peers, 1 if quick else args.rounds, size, cold))
    for name, peer in peers.items():
        each = round(peer.bytes_used() / capacity, 1)
        rows.append({"case": f"memory, {case}", "backend": name, "bytes_per_transition": each})
    ours = peers["rlv2v"]
    del peers  # the others' threads, before two threads share the cores
    rows.append(thread_row(case, ours, samples))
    return rows + (memory_rows(capacity) if video else [save_row(ours.replay)])


def main(args: Args) -> None:
    """Check, time, print the tables and the JSON line; exit code 1 if a buffer of ours did something wrong."""
    with Bench("replay", args) as bench:
        names = available(bench)
        for row in fault_rows(names, [check for check in CHECKS if not (args.quick and check == "distribution")]):
            bench.add([row])
        for video in (False, True):
            bench.add(payload_rows(names, args, video))


if __name__ == "__main__":
    run_command(main, Args)
