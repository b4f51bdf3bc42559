"""Prioritised replay against its peers: microseconds a call, bytes a transition, and where a buffer's data is wrong.

    python bench/replay.py [--json F] [--quick]

First what each buffer does in trouble (replay_faults). Then one process, one thread, all buffers in turn, a block of
turns of one after a block of another. A turn is a learner's: add 64, sample 256 with weights, update those 256, each
timed alone (so that a tree that puts its work off pays for it in the next call); `add 1` adds one row, as a learner
that takes one step at a time. The first fifth of a block warms the caches and is not timed; `cold` sweeps the caches
before every call instead. A video sample is also given in percent of numpy's copy of as many bytes, which a copy past
the caches can exceed. Peers come with `pip install -e '.[bench]'`, torchrl and reverb where they import.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import numpy as np
import torch
from machine import commit, machine
from replay_faults import CHECKS, fault_rows, torn_rows
from replay_peers import MAKERS, Ours, available
from replay_rows import ADDED, DRAWN, FRAME, STATE, Payload, Peer

from rlv2v.cli import run_command
from rlv2v.errors import UserError
from rlv2v.replay import PrioritizedReplay

BLOCK = 50
CALLS = ("sample", "update", "add", "add 1")
Times = dict[str, dict[str, list[float]]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Args:
    """Time our replay buffer against others."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    quick: bool = False
    """A tenth of the capacity, a sixth of the turns, and no check of the distribution."""


def build(name: str, capacity: int, payload: Payload, video: bool) -> Peer:
    """A full buffer with random priorities, which returned right rows."""
    peer = MAKERS[name](capacity, payload, video)
    peer.fill()
    rng = np.random.default_rng(0)
    for _ in range(min(capacity // DRAWN, 500) // peer.share):
        ids, _, _ = peer.read(peer.sample())
        peer.update(ids, random_priorities(rng))
    num_wrong = peer.wrong(peer.sample()).sum()
    if num_wrong:
        raise UserError(f"{name}: {num_wrong} of {DRAWN} rows are wrong before anything was timed")
    rest(peer)
    return peer


def rest(peer: Peer) -> None:
    """Until a buffer that draws ahead is done with it: its threads are not to disturb whoever is timed next."""
    if peer.ahead:
        time.sleep(0.3)


def random_priorities(rng: np.random.Generator) -> Any:
    return (rng.random(DRAWN) + 1e-3).astype(np.float32)


def turns(peers: dict[str, Peer], blocks: int, size: int, cold: bool) -> tuple[Times, dict[str, Any]]:
    """Microseconds of each call of each buffer in blocks of `size` turns, and its last batch.

    A row is added alone (`add 1`) with tiny payload only: windows of video come with their clip.
    """
    times: Times = {name: {call: [] for call in CALLS} for name in peers}
    memory, rng, batches = np.zeros(2**26, np.uint8), np.random.default_rng(1), dict[str, Any]()

    def timed(call: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        if cold:
            np.add(memory, 1, out=memory)
        began = time.perf_counter_ns()
        result = call(*args)
        return (time.perf_counter_ns() - began) / 1e3, result

    for _ in range(blocks):
        for name, peer in peers.items():
            count = max(size // peer.share, 5)
            batches.pop(name, None)
            for _ in range(peer.ahead):
                peer.sample()  # drawn while nobody looked
            for turn in range(count):
                rows, priorities = peer.prepare(ADDED), random_priorities(rng)
                spent = {"add": timed(peer.add, rows)[0]}
                if not peer.video:
                    spent["add 1"], _ = timed(peer.add_one, peer.prepare_one())
                spent["sample"], batch = timed(peer.sample)  # the last batch is held until this one is there
                spent["update"], _ = timed(peer.update, peer.read(batch)[0], priorities)
                if cold or turn >= count // 5:
                    for call, us in spent.items():
                        times[name][call].append(us)
            batches[name] = batch
            rest(peer)
    return times, batches


def copy_rate(num_bytes: int) -> float:
    """Bytes a microsecond of a plain copy, one thread, out of and into memory that is outside the caches."""
    size = max(num_bytes, 2**28)
    source, target, times = np.ones(size, np.uint8), np.ones(size, np.uint8), []
    for _ in range(5):
        began = time.perf_counter_ns()
        np.copyto(target, source)
        times.append((time.perf_counter_ns() - began) / 1e3)
    return size / median(times)


def timing_rows(case: str, peers: dict[str, Peer], times: Times, batches: dict[str, Any], video: bool) -> list[Row]:
    """Rows of one case; prints its lines of the table. video: samples in percent of a memcpy of as many bytes."""
    rows = []
    num_bytes = {name: peer.batch_bytes(batches[name]) for name, peer in peers.items()}
    rate = copy_rate(max(num_bytes.values())) if video else 0.0
    num_wrong = {name: int(peer.wrong(batches[name]).sum()) for name, peer in peers.items()}
    for call in [call for call in CALLS if all(times[name][call] for name in peers)]:
        # The mean of one that draws ahead: a batch that waits costs nothing in the call, the next one all the more.
        medians = {name: (fmean if peer.ahead else median)(times[name][call]) for name, peer in peers.items()}
        for name, p50 in medians.items():
            p20, _, p80 = quantiles(times[name][call], n=10)[1::3]
            alone = video and call == "sample" and not peers[name].ahead  # else part of the work is not in the call
            percent = round(100 * num_bytes[name] / rate / p50, 1) if alone else None
            fault = f"{num_wrong[name]} of {DRAWN} rows" if num_wrong[name] else None
            row: Row = {"case": case, "backend": name, "pass": call, "dtype": "uint8", "turns": len(times[name][call])}
            row |= {
                "mean_us" if peers[name].ahead else "median_us": round(p50, 2),
                "p20_us": round(p20, 2),
                "p80_us": round(p80, 2),
            }
            row |= {"percent_of_memcpy": percent, "valid": fault is None, "wrong_data": fault}
            rows.append(
                row | {"speedup_over": {peer: round(us / p50, 2) for peer, us in medians.items() if peer != name}}
            )
            figures = f"{p50:10.1f} {p20:10.1f} {p80:10.1f} | {p50 / medians['rlv2v']:7.2f}"
            said = f"{'' if percent is None else f'{percent:.0f}%':>4}"
            print(f"{case:10} | {call:6} | {name:8} | {figures} | {said} | {fault or ''}", flush=True)
    return rows


def peer_memory_rows(case: str, peers: dict[str, Peer]) -> list[Row]:
    """Bytes a transition of the buffers that were timed; reverb has no count of its own."""
    rows = []
    for name, peer in peers.items():
        used = peer.bytes_used()
        if used is not None:
            rows.append(
                {"case": f"memory, {case}", "backend": name, "bytes_per_transition": round(used / peer.capacity, 1)}
            )
            print(f"memory, {case}: {name} {used / peer.capacity:.1f} bytes a transition")
    return rows


def memory_rows(capacity: int) -> list[Row]:
    """Memory of a video buffer filled once, 512 windows a video: each one frame on, with the next frame as action or a
    frame of its own; or each where the last one's action was, so that no two share a frame but that.
    """
    rows, frame_bytes, windows = [], int(np.prod(FRAME)), 512
    for case, stride, new_action, size in (
        ("overlapping states", 1, False, capacity),
        ("overlapping states, a new action frame each", 1, True, capacity),
        ("states apart", STATE, False, max(windows, capacity // 4)),
    ):
        replay = PrioritizedReplay(size, FRAME, STATE)
        starts = np.arange(windows) * stride
        for _ in range(size // windows):
            clip = replay.put_clip(np.zeros((starts[-1] + STATE + 1, *FRAME), np.uint8))
            following = (clip, starts + STATE)
            replay.add(
                state=(clip, starts, np.full(windows, STATE)),
                action=np.zeros((windows, *FRAME), np.uint8) if new_action else following,
                reward=np.zeros(windows, np.float32),
                true_frame=following,
                position=starts,
            )
            clip.release()
        each, frames = replay.bytes_used / size, replay.stats["frames"] / size
        row: Row = {"case": f"memory, {case}", "backend": "rlv2v", "bytes_per_transition": round(each)}
        row |= {"frames_per_transition": round(frames, 4), "frames_referred_to": STATE + 1 + new_action}
        rows.append(row | {"bytes_beside_frames": round(each - frames * frame_bytes, 1)})
        held = f"{frames:.3f} frames + {each - frames * frame_bytes:.0f} bytes"
        print(f"memory, {case}: {each / 1e3:.2f} KB a transition = {held}; refers to {STATE + 1 + new_action} frames")
    return rows


def thread_rows(case: str, peer: Ours, rounds: int, repeats: int = 15, seconds: float = 1.0) -> list[Row]:
    """Rate of two sampling threads over one's, `rounds` samples each, in alternation with what the cores give two
    threads that hash what fits the caches; then torn rows beside a writer.
    """
    hashed = np.zeros(2**19, np.uint8)

    def sampling(count: int) -> None:
        for _ in range(count):
            batch = peer.sample()  # held until the next is there, as a learner does
        del batch

    def hashing(count: int) -> None:
        for _ in range(count):
            hashlib.sha256(hashed.data)

    def rate(work: Callable[[int], None], threads: int, count: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(work, count) for _ in range(threads)]:
                done.result()
        return threads * count / (time.perf_counter() - began)

    ratios: dict[str, list[float]] = {"sampling": [], "hashing": []}
    for _ in range(repeats):
        for work, count in ((sampling, rounds), (hashing, 500)):
            ratios[work.__name__].append(rate(work, 2, count) / rate(work, 1, count))
    ratio, limit = (median(found) for found in ratios.values())
    print(f"2 threads sampling, {case}: {ratio:.2f} x the rate of one, hashing {limit:.2f} x (medians of {repeats})")
    torn, checked = torn_rows(peer, seconds)
    print(f"2 samplers + 1 writer (add, update), {case}: {torn} torn rows of {checked}", flush=True)
    beside: Row = {"case": f"2 samplers + 1 writer (add, update), {case}", "backend": "rlv2v", "torn_rows": torn}
    return [
        {"case": f"2 threads, {case}", "backend": "rlv2v", "ratio": round(ratio, 3), "limit": round(limit, 3)},
        beside | {"rows_checked": checked, "valid": torn == 0},
    ]


def save_row(replay: PrioritizedReplay) -> Row:
    """Milliseconds to save and load, and whether the next 100 samples are the same."""
    with tempfile.TemporaryDirectory() as folder:
        path, saves = Path(folder) / "replay", []
        for _ in range(9):
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
    row = {"case": f"save {len(replay)} transitions", "backend": "rlv2v", "save_ms": round(median(saves), 1)}
    print(f"save {len(replay)} transitions, {size / 1e6:.0f} MB: {row['save_ms']} ms, load {load:.0f} ms, same: {same}")
    return row | {"load_ms": round(load, 1), "megabytes": round(size / 1e6, 1), "valid": same}


def print_faults(names: list[str], checks: list[str]) -> list[Row]:
    """Rows of what each buffer does in trouble; prints them."""
    print("fault check | buffer | outcome")
    rows = []
    for row in fault_rows(names, checks):
        rows.append(row)
        mark = "" if row["valid"] is not False else "WRONG: "
        print(f"{row['case'].removeprefix('fault, '):13} | {row['backend']:8} | {mark}{row['outcome']}", flush=True)
    return rows


def ours_failed(rows: list[Row]) -> bool:
    return any(row["backend"] == "rlv2v" and not row.get("valid", True) for row in rows)


def main(args: Args) -> None:
    """Check, time, print the tables and the JSON line; exit code 1 when a buffer of ours did something wrong."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    torch.set_num_threads(1)
    names, missing = available()
    for name, why in missing.items():
        print(f"{name}: not measured, {why}")
    rows = print_faults(names, [check for check in CHECKS if not (args.quick and check == "distribution")])

    blocks, scale = (1, 10) if args.quick else (6, 1)
    print("case | call | buffer | us p50 p20 p80 | x ours | of memcpy | wrong data")
    payload = Payload((16,), 1)
    peers = {name: build(name, 1_000_000 // scale, payload, False) for name in names}
    for case, cold in (("tiny", False), ("tiny, cold", True)):
        timed = turns(peers, blocks, 10 * min(blocks, 2) if cold else BLOCK, cold)
        rows += timing_rows(case, peers, *timed, video=False)
    rows += peer_memory_rows("tiny", peers)
    ours = peers["rlv2v"]
    assert isinstance(ours, Ours)
    del peers, timed  # before two threads share the cores
    rows += [save_row(ours.replay), *thread_rows("tiny", ours, 2000 // scale)]
    del ours

    payload, capacity = Payload(FRAME, STATE), 512 if args.quick else 4096
    peers = {name: build(name, capacity, payload, True) for name in names}
    timed = turns(peers, blocks, BLOCK // 5, False)
    rows += timing_rows("video", peers, *timed, video=True)
    rows += peer_memory_rows("video", peers)
    ours = peers["rlv2v"]
    assert isinstance(ours, Ours)
    del peers, timed
    rows += thread_rows("video", ours, 10 if args.quick else 20)
    del ours
    rows += memory_rows(capacity)

    text = json.dumps({"bench": "replay", "commit": commit(), "machine": machine(1), "missing": missing, "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if ours_failed(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
