"""What more GPUs bring: step time by batch and all-reduce time by size, measured; bytes a step, counted; a prediction.

    python bench/scaling.py [--json F] [--device auto] [--presets default workstation]

Measured here: a step of one rank with 1, 2 and 4 times the batch; all-reduces of 4 KiB to 64 MiB through the Reducer
that training uses, over gloo on CPUs and over NCCL where there are two GPUs or more, and the line through them; a step
of two ranks, beside one rank alone and two that run at the same time and know nothing of each other. The model
(scaling_model.py) has to foretell the step of two ranks from the rest. Then it is asked about cards and links that are
not here: predictions, of inputs that the JSON names.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine
from scaling_model import (
    CARDS,
    CASES,
    LINKS,
    Card,
    Case,
    Link,
    Timeline,
    between_nodes,
    fit,
    no_send,
    predict,
    timeline,
)
from scaling_ranks import Job, run_jobs
from scaling_trace import Event, Op, Send, sent_bytes, trace

from rlv2v.cli import run_command
from rlv2v.config import PRESETS, Config
from rlv2v.errors import UserError
from rlv2v.runtime.device import pick_device

Row = dict[str, Any]
SIZES = tuple(4096 * 4**k for k in range(8))
GPUS, NODES, PER_NODE = (1, 2, 4, 8), (2, 4, 8, 16), 4
BOXES = (("RTX 3070", "PCIe 4.0 x16"), ("RTX 3070", "PCIe 4.0 x8"), ("H100 SXM", "NVLink"), ("H200 SXM", "NVLink"))
NETS = (("RTX 3070", "PCIe 4.0 x16", ("10 GbE", "25 GbE", "100 GbE")), ("H100 SXM", "NVLink", ("100 GbE",)))
DATA = Path(__file__).parent / "results" / "data.json"
# Only the proportions of a step's operators on a CPU come from these; their sum is scaled to what was measured.
CORE = Card("one core", half=100e9, single=100e9, bandwidth=10e9)
PEAKS = CASES[1]


@dataclass(frozen=True)
class Args:
    """Measure what a prediction of scaling needs, and predict."""

    json: Path | None = None
    """File for the JSON too, in a folder that exists."""
    device: str = "auto"
    """Where ranks run: cpu, cuda; auto: cuda where there is one."""
    measured: str = "default"
    """Preset whose steps are timed here."""
    size: int | None = None
    """Side of its frames, pixels; the preset's unless given."""
    presets: tuple[str, ...] = ("default", "workstation")
    """Presets to predict for."""
    batches: tuple[int, ...] = (1, 2, 4)
    """Multiples of the preset's batch to time."""
    sizes: tuple[int, ...] = SIZES
    """Bytes of the all-reduces."""
    rounds: int = 3
    """Times that each form of a step is run, in turns."""
    cycles: int = 3
    """Timed cycles of steps (4 steps of the default preset) in each."""
    repeats: int = 15
    """Timed all-reduces of each size."""


def config_of(name: str, size: int | None = None) -> Config:
    """A preset's config, with other frames where a size is given."""
    changes: dict[str, Any] = {"size": size} if size else {}
    if name not in PRESETS:
        name, wide = "default", {"widths": (16, 32, 48), "disc_widths": (16, 32, 48, 64, 64)}
        changes = {"size": 128, "frames": 16, "precision": "bf16"} | wide | changes
    return Config.of(name, **changes).check()


def timing_row(case: str, backend: str, what: str, dtype: str, seconds: Sequence[float]) -> Row:
    """A row in the house form, printed."""
    p20, p50, p80 = (1e6 * q for q in statistics.quantiles(seconds, n=10, method="inclusive")[1::3])
    row: Row = {"case": case, "backend": backend, "pass": what, "dtype": dtype}
    row |= {"median_us": round(p50, 1), "p20_us": round(p20, 1), "p80_us": round(p80, 1)}
    print(f"{case} | {backend} | {p50 / 1e3:.3f} ms p50 | {p20 / 1e3:.3f} p20 | {p80 / 1e3:.3f} p80", flush=True)
    return row | {"percent_of_limit": None, "speedup_over": {}}


def step_job(args: Args, factor: int) -> Job:
    """Steps with `factor` times the clips, stills and transitions of the preset."""
    config = config_of(args.measured, args.size)
    names = ("batch_x", "batch_y", "batch_z", "batch_s", "transitions")
    config = config.replace(**{name: factor * getattr(config, name) for name in names})
    return {"what": "step", "config": config.to_json(), "cycles": args.cycles, "device": args.device, "batch": factor}


def joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of a job as one: all its steps, and the means of its parts."""
    parts = {part: statistics.mean(f["parts"][part] for f in found) for part in found[0]["parts"]}
    return {"step": [seconds for f in found for seconds in f["step"]], "parts": parts}


def measure_steps(args: Args) -> list[Row]:
    """Of one rank by batch; and in turns of one beside another run, and of two that train together, as far as here."""
    kind = backend(args.device)
    forms: dict[str, tuple[int, Any]] = {f"x{n}, one rank": (1, [step_job(args, n)]) for n in args.batches}
    if kind == "cpu":
        forms["x1, one rank beside another run"] = 1, [step_job(args, 1)] * 2
    if kind == "cpu" or torch.cuda.device_count() > 1:
        forms["x1, two ranks"] = 2, [step_job(args, 1)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in forms}
    for _ in range(args.rounds):
        for name, (ranks, jobs) in forms.items():
            found[name] += run_jobs(jobs, ranks)
    config, rows = config_of(args.measured, args.size), list[Row]()
    for name, (ranks, jobs) in forms.items():
        case, together = (
            f"{args.measured} {config.data.size}x{config.data.size} T={config.data.frames} batch {name}",
            joined(found[name]),
        )
        row = timing_row(case, kind, "step", config.runtime.precision, together["step"])
        parts = {part: round(1e3 * seconds, 3) for part, seconds in together["parts"].items() if seconds}
        row |= {"batch": jobs[0]["batch"], "ranks": ranks, "runs_at_once": len(jobs), "parts_ms": parts}
        rows.append(row)
    return rows


def backend(device: str) -> str:
    return pick_device(device).type


def measure_all_reduces(args: Args, device: str, ranks: int) -> tuple[list[Row], Row]:
    """Rows by size, and the line through their medians."""
    job: Job = {"what": "all_reduce", "sizes": args.sizes, "repeats": args.repeats, "device": device}
    found, name = run_jobs([job], ranks)[0], "nccl" if device == "cuda" else "gloo"
    rows, medians = list[Row](), list[float]()
    for size in args.sizes:
        seconds = found[str(size)]
        medians.append(statistics.median(seconds))
        row = timing_row(f"all-reduce {size // 1024} KiB, {ranks} ranks", name, "all_reduce", "float32", seconds)
        bus = 2 * (ranks - 1) / ranks * size / medians[-1]
        rows.append(row | {"bytes": size, "ranks": ranks, "bus_gb_s": round(bus / 1e9, 3)})
    latency, bandwidth, errors = fit(args.sizes, medians)
    line: Row = {"backend": name, "ranks": ranks, "latency_us": round(1e6 * latency, 1)}
    line |= {"gb_s": round(bandwidth / 1e9, 3), "errors": [round(e, 3) for e in errors]}
    print(f"{name}, {ranks} ranks: {line['latency_us']} us + bytes / {line['gb_s']} GB/s; errors {line['errors']}")
    return rows, line


@cache
def traced(config: Config) -> list[list[Event]]:
    """Of one rank of two; what a rank gives to a collective is the same for any number of them."""
    return trace(config, 2)


def counted(steps: Sequence[Sequence[Event]]) -> Row:
    """What a rank does and sends a step, on average over a cycle."""
    ops = [event for events in steps for event in events if isinstance(event, Op)]
    sends = [event for events in steps for event in events if isinstance(event, Send)]
    num = len(steps)
    return {
        "gflop": round(sum(op.flops for op in ops) / num / 1e9, 3),
        "gflop_16_bit": round(sum(op.flops for op in ops if op.half) / num / 1e9, 3),
        "gbytes_moved": round(sum(op.bytes for op in ops) / num / 1e9, 3),
        "operators": len(ops) / num,
        "collectives": len(sends) / num,
        "bytes_sent": {what: round(size, 1) for what, size in sent_bytes(steps).items()},
    }


def lines_of(steps: Sequence[Sequence[Event]], card: Card, case: Case) -> list[Timeline]:
    return [timeline(events, partial(card.seconds, case=case)) for events in steps]


def foretold(lines: Sequence[Timeline], link: Link, gpus: int) -> Row:
    """A row of predictions."""
    of_send = no_send if gpus == 1 else partial(link.collective, num_ranks=gpus)
    step = predict(lines, of_send)
    row: Row = {"gpus": gpus, "link": link.name, "compute_ms": round(1e3 * step.compute, 3)}
    row |= {"exposed_ms": round(1e3 * step.exposed, 3), "sent_ms": round(1e3 * step.sent, 3)}
    return row | {"efficiency": round(step.efficiency, 4)}


def measured_link(line: Row) -> Link:
    """The link whose rings take as long as a line through all-reduces says."""
    hops = 2 * (line["ranks"] - 1)
    return Link(f"{line['backend']} here", 1e-6 * line["latency_us"] / hops, 1e9 * line["gb_s"] * hops / line["ranks"])


def predictions(
    name: str, steps: Sequence[Sequence[Event]], clips: int, loader: float, here: Link | None = None
) -> list[Row]:
    """For all cards, cases and links. clips: of a rank a step; loader: clips/s of one loader; here: a measured link."""
    rows, cards = list[Row](), {card.name: card for card in CARDS}
    for case in CASES:
        lines = {card: lines_of(steps, cards[card], case) for card in cards}
        about: Row = {"preset": name, "case": case.name}
        boxes = [(card, LINKS[link]) for card, link in BOXES] + [(card, here) for card in cards if here]
        for card, link in boxes:
            for gpus in GPUS:
                row = about | {"card": card, "nodes": 1} | foretold(lines[card], link, gpus)
                needed = clips / (row["compute_ms"] + row["exposed_ms"]) * 1e3
                rows.append(row | {"clips_per_s_a_rank": round(needed, 1), "loader_share": round(needed / loader, 4)})
        for card, inside, nets in NETS:
            for net in nets:
                link_between = between_nodes(LINKS[inside], LINKS[net])
                for nodes in NODES:
                    row = about | {"card": card, "nodes": nodes}
                    rows.append(row | foretold(lines[card], link_between, PER_NODE * nodes))
    return rows


def validate(args: Args, rows: Sequence[Row], line: Row) -> Row | None:
    """The step of two ranks by the model, from the other rows, and as measured."""
    medians = {(row["ranks"], row["runs_at_once"]): row["median_us"] for row in rows if row.get("batch") == 1}
    if (2, 1) not in medians:
        return None
    alone, measured = medians[1, 1], medians[2, 1]
    beside = medians.get((1, 2), alone)
    lines = lines_of(traced(config_of(args.measured, args.size)), CORE, PEAKS)
    latency, bandwidth = 1e-6 * line["latency_us"], 1e9 * line["gb_s"]

    def of_send(send: Send) -> float:
        return latency + send.bytes / bandwidth

    scale = 1e-6 * beside / predict(lines, no_send).compute
    step = predict(lines, of_send, scale)
    hidden, bare = 1e6 * (step.compute + step.exposed), 1e6 * (step.compute + step.sent)
    found: Row = {"one_rank_us": alone, "one_rank_beside_another_us": beside, "sent_us": round(1e6 * step.sent, 1)}
    found |= {"predicted_us": round(hidden, 1), "predicted_nothing_hidden_us": round(bare, 1)}
    found |= {"measured_us": measured, "predicted_over_measured": round(hidden / measured, 4)}
    found |= {"efficiency_measured": round(alone / measured, 4), "of_one_beside_another": round(beside / measured, 4)}
    print(f"two ranks: {found}")
    return found


def loader_rate(size: int, frames: int) -> float:
    """Clips/s of one loader from a prepared raw set, by the pixels of bench/results/data.json's (64x64, T=16)."""
    rows = json.loads(DATA.read_text())["rows"]
    rate: float = next(
        row["clips_per_s"] for row in rows if row["case"] == "prepared raw 64" and row["backend"] == "Loader"
    )
    return rate * (64 * 64 * 16) / (size * size * frames)


def print_predictions(rows: Sequence[Row]) -> None:
    """One line a card, case and link; efficiencies by number of GPUs."""
    print("predicted: preset | card | case | link | step ms of one GPU | efficiency by number of GPUs")
    seen: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        seen.setdefault((row["preset"], row["card"], row["case"], row["link"]), []).append(row)
    for key, group in seen.items():
        told = "  ".join(f"{row['gpus']}: {100 * row['efficiency']:.1f} %" for row in group)
        print(f"{' | '.join(key)} | {group[0]['compute_ms']:.2f} | {told}")


def main(args: Args) -> None:
    """Measure, count, predict; print tables and the JSON line."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if min(args.rounds, args.repeats - 1) < 1 or args.rounds * args.cycles < 2:
        raise UserError("--rounds, --repeats, --cycles: expected at least 1, 2, and two cycles in all rounds")
    if 1 not in args.batches or len(set(args.sizes)) < 2 or min(args.sizes) < 4:
        raise UserError("--batches, --sizes: expected 1 among the batches, and two sizes of at least 4 bytes")
    for name in {args.measured, *args.presets} - {*PRESETS, "workstation"}:
        raise UserError(f"--measured, --presets: expected some of {', '.join((*PRESETS, 'workstation'))}, got {name!r}")
    torch.set_num_threads(1)
    rows = measure_steps(args)
    lines = list[Row]()
    for ranks in (2, 4):
        if (os.cpu_count() or 1) >= ranks:
            rows_of, line = measure_all_reduces(args, "cpu", ranks)
            rows, lines = rows + rows_of, [*lines, line]
        if torch.cuda.device_count() >= ranks:
            rows_of, line = measure_all_reduces(args, "cuda", ranks)
            rows, lines = rows + rows_of, [*lines, line]
    own = "nccl" if backend(args.device) == "cuda" else "gloo"
    used = [line for line in lines if line["ranks"] == 2 and line["backend"] == own]
    checked = validate(args, rows, used[0]) if used else None

    here = next((measured_link(line) for line in reversed(lines) if line["backend"] == "nccl"), None)
    counts, foreseen = dict[str, Row](), list[Row]()
    for name in args.presets:
        config = config_of(name)
        steps = traced(config)
        counts[name] = counted(steps)
        print(f"{name}: a rank and step: {counts[name]}", flush=True)
        clips = config.data.batch_x + config.data.batch_y + config.data.batch_z
        foreseen += predictions(name, steps, clips, loader_rate(config.data.size, config.data.frames), here)
    print_predictions(foreseen)

    inputs = {
        "cards": [asdict(card) for card in CARDS],
        "cases": [asdict(case) for case in CASES],
        "links": {name: asdict(link) for name, link in LINKS.items()},
        "fits": lines,
        "counted": counts,
        "loader_clips_per_s": {n: round(loader_rate(config_of(n).size, config_of(n).frames), 1) for n in args.presets},
    }
    about = {"bench": "scaling", "commit": commit(), "machine": machine(1), "rows": rows}
    text = json.dumps(about | {"inputs": inputs, "validation": checked, "predictions": foreseen})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_command(main, Args)
