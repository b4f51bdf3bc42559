"""Time equation 10, both sides: all prefixes in one pass against every network run anew on every prefix.

    python bench/losses.py [--json F] [--frames 8]

Forward and backward of what G and P descend and of what D ascends (eq. 1-10, no additions), at the default widths and
batch. Values and gradients of the two forms are compared before anything is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Bench, Contender, Row, TimedArgs, compare
from oracle.losses_ref import discriminator_losses_ref, generator_losses_ref
from torch import Tensor

from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips
from rlv2v.method.memory import some_clips
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.patches import draw
from rlv2v.method.terms import TERMS
from rlv2v.model.build import Nets, build_nets

TOLERANCE = {"value": 1e-6, "gradient": 5e-6}
"""Relative, float32."""
PAPER_TERMS: dict[str, Any] = {"disc_frames": 0, "l_tau": 10.0, "l_rc": 10.0} | dict.fromkeys(TERMS, 0.0)
GENERATORS, DISCRIMINATORS = ("g_x", "g_y", "p_x", "p_y"), ("d_x", "d_y")


@dataclass(frozen=True)
class Args(TimedArgs):
    """Time the all-prefix losses against the literal ones."""

    frames: tuple[int, ...] = (8,)
    """Clip lengths T, one case each."""
    size: int = 32
    """Side of the frames, pixels."""


def both_sides(nets: Nets, clips: Clips, config: Config, *, literal: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the value of each side, and the gradient of every weight that the side moves."""
    steps = torch.arange(config.data.frames)
    draws = draw(np.random.default_rng(0), 1, range(1), torch.device("cpu"))
    values, gradients = list[Tensor](), list[Tensor]()

    def side(terms: dict[str, Tensor], names: tuple[str, ...]) -> None:
        weights = [p for name in names for p in getattr(nets, name).parameters()]
        values.append(torch.stack(list(terms.values())).sum())
        gradients.extend(torch.autograd.grad(values[-1], weights, materialize_grads=True))

    if literal:
        side(generator_losses_ref(nets, clips, config, steps.tolist()), GENERATORS)
        side(discriminator_losses_ref(nets, clips, config, steps.tolist()), DISCRIMINATORS)
    else:
        terms, out, back = generator_losses(nets, clips, config, 1.0, steps, draws)
        side(terms, GENERATORS)
        side(discriminator_losses(nets, clips, out.fake.detach(), back.fake.detach(), config, steps), DISCRIMINATORS)
    return torch.stack(values).detach(), gradients


def differences(fast: tuple[Tensor, list[Tensor]], literal: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    """Return the largest relative difference of a side's value, and that of all gradients together."""
    value = ((fast[0] - literal[0]) / literal[0]).abs().max().item()
    ours, theirs = (torch.cat([g.flatten() for g in form[1]]) for form in (fast, literal))
    return {"value": value, "gradient": ((ours - theirs).norm() / theirs.norm()).item()}


def case_rows(frames: int, args: Args) -> list[Row]:
    """Check and time the two forms at one clip length."""
    config = Config.of("paint", size=args.size, frames=frames, **PAPER_TERMS)
    torch.manual_seed(0)
    nets, clips = build_nets(config), some_clips(config, 1)
    difference = differences(*(both_sides(nets, clips, config, literal=literal) for literal in (False, True)))
    valid = all(difference[name] <= limit for name, limit in TOLERANCE.items())
    contenders = []
    for name in ("prefixes", "literal"):
        call = partial(both_sides, nets, clips, config, literal=name == "literal")
        fields = {"difference": difference}
        contenders.append(Contender(name, call, ours=name == "prefixes", valid=valid, fields=fields))
    return compare(f"eq10 T={frames} {args.size}x{args.size}", "forward+backward", contenders, args.num_rounds)


def main(args: Args) -> None:
    """Compare, print the table and the JSON line; exit code 1 if the two forms differ."""
    if min(args.frames, default=0) < 2:
        raise UserError("--frames: expected at least 2")
    with Bench("losses", args) as bench:
        for frames in args.frames:
            bench.add(case_rows(frames, args))


if __name__ == "__main__":
    run_command(main, Args)
