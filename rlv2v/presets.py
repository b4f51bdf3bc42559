"""The presets: settings by their flags' names, on top of the config's own defaults."""

from __future__ import annotations

from typing import Any

from rlv2v.method.terms import TERMS

EQUATIONS: dict[str, Any] = {
    "lr": 2e-3,
    "l_adv": 1.0,
    "l_v": 2.0,
    "l_tau": 10.0,
    "l_rc": 10.0,
    "warmup_steps": 80,
    "rl": True,
}
"""All of the paper's losses, its pre-training and its policy gradient."""

PAPER: dict[str, Any] = {
    **EQUATIONS,
    "widths": (8, 16, 24),
    "patch": 1,
    "head": "convlstm",
    "norm": "batch",
    "disc_norm": "batch",
    "gan": "log",
    "rl_every": 1,
    "distance": "l2",
    "disc_frames": 0,
    **{name: term.paper for name, term in TERMS.items()},
    "clip_grad": 0.0,
    "average": 0.0,
    "augment": "none",
    "reward": "paper",
}

PAINT: dict[str, Any] = {
    "head": "mask",
    "chrono": True,
    "lr": 2e-3,
    "warmup_steps": 80,
    **{name: term.paint for name, term in TERMS.items()},
}

# Widths are multiples of 16, to fill the tensor cores. Batches are what `rlv2v.method.memory` says of a card.
GPU: dict[str, Any] = {
    "size": 256,
    "precision": "bf16",
    "widths": (32, 64, 128),
    "disc_widths": (32, 64, 128, 128, 128),
    "loader_threads": 4,
    "budget": 14400.0,
    "snapshot_seconds": 300.0,
}
"""What the presets for GPUs have in common, one replica per rank."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paint": PAINT,
    "paper": PAPER,
    "paper-letter": {**PAPER, "head": "letter", "q_positive": True},
    "tiny": {
        "widths": (4, 8),
        "disc_widths": (4, 8, 8),
        "size": 16,
        "frames": 4,
        **EQUATIONS,
        "warmup_steps": 2,
        "steps": 4,
        "transitions": 2,
        "replay_capacity": 32,
    },
    "laptop": {"size": 128, "budget": 900.0},
    "workstation": {**GPU, "widths": (16, 32, 64), "disc_widths": (16, 32, 64, 64, 64)},
    "gpu24": {**GPU, "batch_x": 4, "batch_y": 2, "batch_z": 4, "batch_s": 8, "batch_pool": 12},
    "gpu80": {**GPU, "batch_x": 8, "batch_y": 4, "batch_z": 8, "batch_s": 16, "batch_pool": 12, "frames": 16},
}
