"""The folder of a run: made once, owned by one process, never overwritten."""

from __future__ import annotations

import logging
from pathlib import Path

from rlv2v.checkpoint.resume import resumed_config, settled_replicas
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import SYNTHETIC, Config
from rlv2v.data.synth import write_dataset
from rlv2v.errors import UserError
from rlv2v.files import Lock, lock_folder, write_atomically

log = logging.getLogger(__name__)


def settle(config: Config, num_ranks: int) -> Config:
    """Return the config with its data folder and number of replicas settled; rank 0 calls it, before anything starts.

    Nothing that exists is overwritten: a folder that holds a run needs --resume. Without --data the synthetic set is
    written, unless it is there.

    Raises:
        UserError: the folder holds a run, or none to resume, or one of other settings.
    """
    saved = 0
    if config.resume:
        resumed = resumed_config(config)
        saved = resumed.runtime.replicas
        config = config if config.data.folder != SYNTHETIC else config.replace(data=resumed.data.folder)
    elif config.out.is_dir():
        require_no_run(config.out)
    elif config.out.exists():
        raise UserError(f"{config.out}: expected a folder for the run, got a file; choose another --out")
    config = config.replace(replicas=settled_replicas(config.runtime.replicas, saved, num_ranks))
    if config.data.folder == SYNTHETIC:
        folder = Path("data") / f"synth-{config.data.size}x{config.data.frames}"
        if not (folder / "dataset.json").exists():
            log.warning("no --data: writing the synthetic set to %s", folder)
            write_dataset(folder, size=config.data.size, frames=config.data.frames)
        config = config.replace(data=folder)
    return config


def create_run_folder(config: Config) -> Lock:
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
