"""The start of a run, new or resumed: its folder, its settings, and the state that a checkpoint brings back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.config import FLAGS, SYNTHETIC, Config
from rlv2v.data.loader import Loader
from rlv2v.data.synth import write_dataset
from rlv2v.errors import UserError, first_line
from rlv2v.files import lock_folder, write_atomically
from rlv2v.method.trainer import Trainer
from rlv2v.runtime.distributed import World

log = logging.getLogger(__name__)
# What may change between a run and its resumption; every other setting makes it another run.
FREE_ON_RESUME = frozenset(
    {
        *("data", "out", "resume", "steps", "budget", "device", "threads", "loader_threads", "snapshot_seconds"),
        *("memory", "graphs", "replicas", "keep", "patience"),
    }
)


def settle(config: Config, num_ranks: int) -> Config:
    """Return the config with its data folder and number of replicas settled; rank 0 calls it, before anything starts.

    Nothing that exists is overwritten: a folder that holds a run needs --resume. Without --data the synthetic set is
    written, unless it is there.

    Raises:
        UserError: the folder holds a run, or none to resume, or one of other settings, or has a name that TensorBoard
            cannot write.
    """
    try:
        str(config.out.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out {config.out.absolute()}: expected a name in UTF-8; choose another folder") from None
    saved_replicas = 0
    if config.resume:
        saved = saved_config(config)
        saved_replicas = saved.runtime.replicas
        config = config if config.data.folder != SYNTHETIC else config.replace(data=saved.data.folder)
    elif config.out.is_dir():
        require_no_run(config.out)
    elif config.out.exists():
        raise UserError(f"{config.out}: expected a folder for the run, got a file; choose another --out")
    config = config.replace(replicas=settled_replicas(config.runtime.replicas, saved_replicas, num_ranks))
    if config.data.folder == SYNTHETIC:
        side = max(config.data.size.height, config.data.size.width)
        folder = Path("data") / f"synth-{side}x{config.data.frames}"
        if not (folder / "dataset.json").exists():
            log.warning("no --data: writing the synthetic set to %s", folder)
            try:
                write_dataset(folder, size=side, frames=config.data.frames)
            except OSError as error:
                reason = str(error.strerror).lower()
                raise UserError(f"{folder}: cannot be written: {reason}; name a dataset by --data") from None
        config = config.replace(data=folder)
    return config


def saved_config(config: Config) -> Config:
    """Return the config in the folder of a run that is to be resumed, which may differ in `FREE_ON_RESUME` alone.

    Raises:
        UserError: no run there, one of another version, or a setting that shapes the run has changed.
    """
    path = config.out / "config.json"
    if not path.is_file():
        raise UserError(
            f"{config.out}: expected the folder of a run to resume, found no config.json; leave out --resume"
        )
    saved = Config.read(path)
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
    settled = wanted if wanted % num_ranks == 0 else num_ranks
    if not saved and settled != wanted:
        raise UserError(f"--replicas: expected a multiple of the {num_ranks} ranks, got {wanted}")
    if settled != wanted:
        log.warning("%d replicas do not go evenly into %d ranks; going on with %d", wanted, num_ranks, settled)
    if saved and settled != saved:
        first, last = sorted((settled, saved))
        log.warning(
            "%d replicas, %d before: a step takes %d instead of %d times the batch, clips go on at the nearest place "
            "in their order, replay buffers %d to %d %s; from here on it is another run than it would have been",
            settled, saved, settled, saved, first, last - 1, "are dropped" if settled < saved else "begin empty",
        )  # fmt: skip
    return settled


def create_run_folder(config: Config) -> FileIO:
    """Make the run's folder this process's own and write `config.json`; from then on it can be resumed.

    Returns the lock, to be held as long as the run.

    Raises:
        UserError: another run is at work in it, or has left a checkpoint there meanwhile; it cannot be written.
    """
    try:
        for folder in (config.out, config.out / "samples", config.out / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(config.out)
        if not config.resume:
            require_no_run(config.out)
        write_atomically(config.out / "config.json", config.to_json().encode())
    except OSError as error:
        raise UserError(
            f"{error.filename or config.out}: expected a folder that a run can be written to, got "
            f"{str(error.strerror).lower()}; choose another --out"
        ) from None
    return lock


def require_no_run(out: Path) -> None:
    """Raise UserError if a folder holds a checkpoint: nothing that exists is overwritten."""
    if Checkpoints(out, keep=1, num_replicas=1).steps:
        raise UserError(f"{out}: holds a run already; go on with it by --resume, or choose another --out")


def save(
    store: Checkpoints,
    trainer: Trainer,
    loader: Loader,
    world: World,
    *,
    metric: float | None,
    run_files: Mapping[str, bytes],
) -> None:
    """Begin to write a checkpoint of everything that a run needs to go on as if nothing had happened.

    metric, run_files: see `Checkpoints.save`.
    """
    trainer.flush()
    rng = {"cpu": torch.get_rng_state()}  # no step draws from it, but what a user adds may
    if world.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(world.device)
    state = {name: part.state_dict() for name, part in trainer.state_parts.items()}
    state |= {"rng": rng, "num_ranks": world.size}
    replicas = {
        replica: {name: part.state_dict() for name, part in replays.items()} | {"loader": loader.state_dict()}
        for replica, replays in trainer.replays().items()
    }
    store.save(trainer.schedule.step, state if world.first else None, replicas, metric=metric, run_files=run_files)


def restore(store: Checkpoints, trainer: Trainer, loader: Loader, world: World) -> bool:
    """Load every part of a run from its newest whole checkpoint; return False if it has none and starts anew.

    Raises:
        UserError: no checkpoint is whole, or it is of another set-up.
    """
    step = world.broadcast_object(store.newest)
    if step is None:
        return False
    name = f"{store.run}: checkpoint {step}"
    saved = store.load(step, "state", world.device)
    load_states(trainer.state_parts, saved, name)
    torch.set_rng_state(saved["rng"]["cpu"].cpu())
    if world.device.type == "cuda" and "cuda" in saved["rng"]:
        torch.cuda.set_rng_state(saved["rng"]["cuda"].cpu(), world.device)
    saved_replicas, num_replicas = store.replicas(step), trainer.config.runtime.replicas
    for replica, replays in trainer.replays().items():
        if replica < saved_replicas:
            load_states(replays, store.load(step, replica_name(replica)), name)
    cursor = store.load(step, replica_name(min(trainer.replicas[0], saved_replicas - 1)))["loader"]
    if num_replicas != saved_replicas:  # go on at the first step after all clips that were drawn
        first_step = -(-cursor["step"] * saved_replicas // num_replicas)
        cursor = cursor | {"step": first_step, "batch": loader.state_dict()["batch"]}
    load_states({"loader": loader}, {"loader": cursor}, name)
    if saved["num_ranks"] != world.size and num_replicas == saved_replicas and world.first:
        log.warning(
            "on %d ranks, %d before: clips, draws and replay buffers go on as they were; sums are added in another "
            "order, so weights agree to rounding with those of the run as it was, not to the bit",
            world.size, saved["num_ranks"],
        )  # fmt: skip
    return True


def load_states(parts: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: str) -> None:
    """Give each part its saved state. Raises UserError naming the first that is missing or does not fit."""
    for name, part in parts.items():
        if name not in saved:
            raise UserError(f"{checkpoint}: lacks {name!r}; it is of another set-up of the run")
        try:
            part.load_state_dict(saved[name])
        except UserError:
            raise
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{checkpoint}: {name!r} does not fit this run: {first_line(error)}") from None
