"""How a run goes on: what may change in between, what a checkpoint holds, and what it gives back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.config import FLAGS, Config
from rlv2v.data.loader import Loader
from rlv2v.errors import UserError
from rlv2v.method.step import Algorithm
from rlv2v.runtime.distributed import World

log = logging.getLogger(__name__)
# What may change between a run and its resumption; every other setting makes it another run.
FREE_ON_RESUME = frozenset(
    {
        *("data", "out", "resume", "steps", "budget", "device", "threads", "loader_threads", "snapshot_seconds"),
        *("memory", "graphs", "replicas", "keep"),
    }
)


def resumed_config(config: Config) -> Config:
    """Return the config in the folder of a run that is to be resumed, which may differ in `FREE_ON_RESUME` alone.

    Raises:
        UserError: no run there, or a setting that shapes the run has changed.
    """
    path = config.out / "config.json"
    if not path.is_file():
        raise UserError(
            f"{config.out}: expected the folder of a run to resume, found no config.json; leave out --resume"
        )
    saved = Config.from_json(path.read_text(), str(path))
    for flag in FLAGS:
        if flag not in FREE_ON_RESUME and saved.get(flag) != config.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')}: the run in {config.out} has {saved.get(flag)!r}, got "
                f"{config.get(flag)!r}; leave it out or start a new run"
            )
    return saved


def settled_replicas(replicas: int, saved: int, num_ranks: int) -> int:
    """Return the number of replicas of a run: as asked for, else as saved with it, else one a rank.

    A resumed run (saved > 0) whose replicas do not go evenly into the ranks gets one a rank, and a warning.

    Raises:
        UserError: the replicas of a new run do not go evenly into the ranks.
    """
    wanted = replicas or saved or num_ranks
    if wanted % num_ranks == 0:
        if saved and wanted != saved:
            log.warning("--replicas %d, %d before: %s", wanted, saved, changed(wanted, saved))
        return wanted
    if not saved:
        raise UserError(f"--replicas: expected a multiple of the {num_ranks} ranks, got {wanted}")
    log.warning(
        "%d replicas do not go evenly into %d ranks; going on with %d: %s",
        wanted,
        num_ranks,
        num_ranks,
        changed(num_ranks, wanted),
    )
    return num_ranks


def changed(now: int, before: int) -> str:
    """Say what is no longer identical when the replicas of a run change."""
    if now < before:
        buffers = f"replay buffers {now} to {before - 1} are dropped"
    else:
        buffers = f"replay buffers {before} to {now - 1} begin empty"
    return (
        f"a step takes {now} instead of {before} times the batch, clips go on at the nearest place in their order, "
        f"{buffers}; from here on it is another run than it would have been"
    )


def save(
    store: Checkpoints,
    algorithm: Algorithm,
    loader: Loader,
    world: World,
    *,
    metric: float | None,
    run_files: Mapping[str, bytes],
) -> None:
    """Begin to write a checkpoint of everything that a run needs to go on as if nothing had happened.

    metric, run_files: see `Checkpoints.save`.
    """
    algorithm.flush()
    state = {name: part.state_dict() for name, part in algorithm.state_parts.items()}
    state |= {"rng": random_states(world.device), "num_ranks": world.size}
    replicas = {
        replica: {name: part.state_dict() for name, part in replays.items()} | {"loader": loader.state_dict()}
        for replica, replays in algorithm.replays().items()
    }
    store.save(algorithm.schedule.step, state if world.first else None, replicas, metric=metric, run_files=run_files)


def restore(store: Checkpoints, algorithm: Algorithm, loader: Loader, world: World) -> bool:
    """Load every part of a run from its newest whole checkpoint; False: it has none yet, and starts anew.

    Raises:
        UserError: no checkpoint is whole, or it is of another set-up.
    """
    step = world.broadcast_object(store.newest)
    if step is None:
        return False
    where = f"{store.run}: checkpoint {step}"
    saved = store.load(step, "state", world.device)
    load_parts(algorithm.state_parts, saved, where)
    set_random_states(saved["rng"], world.device)
    before = store.replicas(step)
    num_replicas = algorithm.config.runtime.replicas
    for replica, replays in algorithm.replays().items():
        if replica < before:
            mine = store.load(step, replica_name(replica))
            load_parts(replays, mine, where)
    cursor = store.load(step, replica_name(min(algorithm.replicas[0], before - 1)))["loader"]
    if num_replicas != before:  # go on at the first step that lies behind all clips that were drawn
        cursor = cursor | {"step": -(-cursor["step"] * before // num_replicas), "batch": loader.state_dict()["batch"]}
    load_parts({"loader": loader}, {"loader": cursor}, where)
    if saved["num_ranks"] != world.size and num_replicas == before and world.first:
        log.warning(
            "on %d ranks, %d before: clips, draws and replay buffers go on as they were; sums are added in another "
            "order, so weights agree to rounding with those of the run as it was, not to the bit",
            world.size, saved["num_ranks"],
        )  # fmt: skip
    return True


def load_parts(parts: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
    """Give each part its saved state. Raises UserError naming the first that is missing or does not fit."""
    for name, part in parts.items():
        if name not in saved:
            raise UserError(f"{where}: lacks {name!r}; it is of another set-up of the run")
        try:
            part.load_state_dict(saved[name])
        except UserError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"{where}: {name!r} does not fit this run: {first}") from None


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Of torch's generators; nothing in a step draws from them, but what a user adds may."""
    return {"cpu": torch.get_rng_state()} | (
        {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    )


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
