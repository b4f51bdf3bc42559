"""The presets: settings by their flags' names, on top of the config's own defaults."""

from __future__ import annotations

from typing import Any

from rlv2v.method.terms import TERMS

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "widths": (8, 16, 24),
        "patch": 1,
        "head": "convlstm",
        "norm": "batch",
        "disc_norm": "batch",
        "q_positive": True,
        "chrono": False,
        "gan": "log",
        "rl_every": 1,
        "distance": "l2",
        "disc_frames": 0,
        **{name: term.paper for name, term in TERMS.items()},
        "adversarial_end": 1.0,
        "clip_grad": 0.0,
        "average": 0.0,
        "augment": "none",
        "reward": "paper",
    },
    "tiny": {
        "widths": (4, 8),
        "disc_widths": (4, 8, 8),
        "size": 16,
        "frames": 4,
        "warmup_steps": 2,
        "steps": 4,
        "transitions": 2,
        "replay_capacity": 32,
    },
    # rlv2v.method.memory counts 7.1 GB, its reserve included. Widths are multiples of 32, to fill the tensor cores.
    "workstation": {
        "size": 128,
        "frames": 16,
        "precision": "bf16",
        "graphs": False,  # its recordings would need 0.8 GB more
        "widths": (32, 64, 128),
        "disc_widths": (32, 64, 128, 128, 128),
        "batch_x": 1,
        "batch_y": 1,
        "batch_z": 1,
        "batch_s": 2,
        "transitions": 1,
        "replay_capacity": 256,
        "loader_threads": 4,
        "budget": 14400.0,
        "snapshot_seconds": 300.0,
    },
}
