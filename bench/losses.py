"""Equation 10, both sides: all prefixes in one pass against every network run anew on every prefix.

    python bench/losses.py [--json F] [--frames 8]

Forward and backward of what G and P descend and of what D ascends (eq. 1-10, no additions), at the default widths and
batch. Values and gradients of the two forms are compared before anything is timed, and the runs alternate.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import commit, machine
from torch import Tensor

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.losses_ref import discriminator_losses_ref, generator_losses_ref
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.model.build import Nets, build_nets

TOLERANCE = {"value": 1e-6, "gradient": 5e-6}  # relative, fp32
ADDITIONS = ("cycle", "identity", "contrast", "mask_prior", "colours")
PAPER_TERMS: dict[str, Any] = {"disc_frames": 0} | dict.fromkeys(ADDITIONS, 0.0)
LEARNED, JUDGED = ("g_x", "g_y", "p_x", "p_y"), ("d_x", "d_y")


@dataclass(frozen=True)
class Args:
    """Time the all-prefix losses against the literal ones."""

    frames: tuple[int, ...] = (8,)
    """Clip lengths T, one row each."""
    size: int = 32
    """Side of the frames, pixels."""
    repeats: int = 15
    """Timed runs of each form."""
    threads: int = 1
    """CPU threads."""
    json: Path | None = None
    """File for the JSON too, in a folder that exists."""


def random_clips(config: Config) -> Clips:
    """A batch of noise in the shape of the config's."""

    def noise(num: int, frames: int) -> Tensor:
        return torch.rand(num, frames, 3, config.data.size, config.data.size) * 2 - 1

    x, y, z = (
        noise(num, config.data.frames) for num in (config.data.batch_x, config.data.batch_y, config.data.batch_z)
    )
    return Clips(x, y, z, noise(config.data.batch_s, 1))


def both_sides(nets: Nets, clips: Clips, config: Config, *, literal: bool) -> tuple[Tensor, list[Tensor]]:
    """(value of each side, gradient of every weight that the side moves)."""
    learned, judged = ([p for name in names for p in getattr(nets, name).parameters()] for names in (LEARNED, JUDGED))
    at = torch.arange(config.data.frames)
    if literal:
        terms = generator_losses_ref(nets, clips, config, at.tolist())
    else:
        terms, out, back = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, torch.empty(3, 0))
    descended = torch.stack(list(terms.values())).sum()
    gradients = torch.autograd.grad(descended, learned, materialize_grads=True)
    if literal:
        terms = discriminator_losses_ref(nets, clips, config, at.tolist())
    else:
        terms = discriminator_losses(nets, clips, out.fake.detach(), back.fake.detach(), config, at)
    ascended = torch.stack(list(terms.values())).sum()
    gradients += torch.autograd.grad(ascended, judged, materialize_grads=True)
    return torch.stack((descended, ascended)).detach(), list(gradients)


def differences(fast: tuple[Tensor, list[Tensor]], literal: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    """Largest relative difference of a side's value, and of all gradients together."""
    value = ((fast[0] - literal[0]) / literal[0]).abs().max().item()
    ours, theirs = (torch.cat([g.flatten() for g in form[1]]) for form in (fast, literal))
    return {"value": value, "gradient": ((ours - theirs).norm() / theirs.norm()).item()}


def alternate(forms: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Microseconds of each form, one run of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            began = time.perf_counter_ns()
            form()
            times[name].append((time.perf_counter_ns() - began) / 1e3)
    return times


def compare(frames: int, args: Args) -> list[dict[str, Any]]:
    """The two rows of one clip length; prints their line of the table."""
    config = Config.of("default", size=args.size, frames=frames, **PAPER_TERMS)
    torch.manual_seed(0)
    nets, clips = build_nets(config), random_clips(config)
    forms = {
        "prefixes": lambda: both_sides(nets, clips, config, literal=False),
        "literal": lambda: both_sides(nets, clips, config, literal=True),
    }
    found = differences(forms["prefixes"](), forms["literal"]())
    valid = all(found[name] <= limit for name, limit in TOLERANCE.items())
    times = alternate(forms, args.repeats)
    case, rows = f"eq10 T={frames} {args.size}x{args.size}", []
    for name, peer in (("prefixes", "literal"), ("literal", "prefixes")):
        p20, p50, p80 = statistics.quantiles(times[name], n=10)[1::3]
        ratio = statistics.median(times[peer]) / p50
        row: dict[str, Any] = {"case": case, "backend": name, "pass": "forward+backward", "dtype": "float32"}
        row |= {"median_us": round(p50), "p20_us": round(p20), "p80_us": round(p80), "percent_of_limit": None}
        rows.append(row | {"speedup_over": {peer: round(ratio, 3)}, "valid": valid, "difference": found})
        print(f"{case} | {name:8} | {p50:9.0f} {p20:9.0f} {p80:9.0f} | {ratio:5.2f}", flush=True)
    return rows


def main(args: Args) -> None:
    """Compare, print the table and the JSON line; exit code 1 when the two forms differ."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    if args.repeats < 2 or args.threads < 1 or min(args.frames, default=0) < 2:
        raise UserError("--repeats, --threads, --frames: expected at least 2, 1, 2")
    torch.set_num_threads(args.threads)
    print("case | form | us p50 p20 p80 | x other form")
    rows = [row for frames in args.frames for row in compare(frames, args)]
    for row in rows[::2]:
        for name, limit in TOLERANCE.items():
            print(f"{row['case']}: relative difference of {name}s {row['difference'][name]:.1e}, limit {limit:g}")
    text = json.dumps({"bench": "losses", "commit": commit(), "machine": machine(args.threads), "rows": rows})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)
    if not all(row["valid"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main, Args)
