"""Helpers of the tests of checkpoints: small states that hold their step, checks, and a way to damage a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlv2v.checkpoint.store import Checkpoints, replica_name


def state_of(step: int, size: int = 1000) -> dict[str, Any]:
    return {"nets": {"w": torch.full((size,), float(step)), "none": None}, "adam": [{"betas": (0.5, 0.9)}], "n": step}


def one_rank(run: Path, keep: int = 9) -> Checkpoints:
    return Checkpoints(run, keep=keep, num_replicas=1)


def save(store: Checkpoints, *steps: int, metric: float | None = None) -> None:
    for step in steps:
        replica = {"seen": torch.full((10,), step), "loader": {"step": step}}
        store.save(step, state_of(step), {0: replica}, metric=metric)
    store.wait()


def assert_holds(store: Checkpoints, step: int) -> None:
    state = store.load(step)
    assert state["n"] == step
    assert bool((state["nets"]["w"] == step).all())
    for replica in range(store.replicas(step)):
        assert bool((store.load(step, replica_name(replica))["seen"] == step).all())


def assert_all_whole(store: Checkpoints) -> None:
    """Check every folder that is named like a checkpoint, byte by byte."""
    for step in (int(path.name) for path in store.folder.glob("[0-9]*")):
        for name in ("state", *map(replica_name, range(store.replicas(step)))):
            store.load(step, name)


def hidden_files(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*")]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0 if path.suffix == ".json" else len(data) // 2] ^= 1
    path.write_bytes(data)
