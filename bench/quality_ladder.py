"""The steps from the preset `paper` to the default, one switch each: methods `ladder-<n>` of bench/quality.py."""

from __future__ import annotations

from typing import Any

SWITCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("preset `paper`", {}),
    ("no policy gradient", {"rl": False, "rl_every": 2, "reward": "transition"}),
    ("norm: over each clip in G, none in D", {"norm": "clip", "disc_norm": "none"}),
    ("hinge loss; D sees 2 single frames", {"gan": "hinge", "disc_frames": 2}),
    ("gradients clipped, weights averaged", {"clip_grad": 5.0, "average": 0.98}),
    ("cycle and identity loss", {"cycle": 10.0, "identity": 4.0}),
    ("G a grid, at half size, lr 5e-3", {"head": "grid", "patch": 2, "lr": 5e-3, "warmup_steps": 0}),
    ("no P", {"l_tau": 0.0, "l_rc": 0.0, "distance": "l1"}),
    ("grid smooth", {"smoothness": 300.0}),
    ("patches; D's losses at 0.3", {"patches": 10.0, "l_adv": 0.3, "l_v": 0.6}),
    ("grid keeps order and hue: the default", {"order": 10000.0, "hue": 100.0}),
)
"""What a rung is called, and what it changes of the one before."""


def rung(number: int) -> dict[str, Any]:
    """Return the settings of a rung, by their flags' names, beside those of the preset `paper`."""
    settings: dict[str, Any] = {}
    for _, changes in SWITCHES[: number + 1]:
        settings |= changes
    return settings


def flags(number: int) -> tuple[str, ...]:
    """Return a rung as flags of `rlv2v.train`."""
    words = ["--preset", "paper"]
    for name, value in rung(number).items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", f"{value}"]
    return tuple(words)


LADDER = {f"ladder-{number:02}": flags(number) for number in range(len(SWITCHES))}
