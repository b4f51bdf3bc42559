"""The folder of a run: made once, owned by one process, never overwritten."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from rlv2v.checkpoint.resume import resumed_config
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.data.synth import write_dataset
from rlv2v.errors import UserError
from rlv2v.files import Lock, lock_folder, write_atomically

log = logging.getLogger(__name__)


def prepare_folder(config: Config) -> Config:
    """Make the run's folder, or check that it is one to resume; returns the config with its data folder settled.

    Nothing that exists is overwritten: a folder that holds a run needs --resume.
    """
    if config.resume:
        before = resumed_config(config)
        config = config if config.data else replace(config, data=before.data)
    elif config.out.is_dir():
        require_no_run(config.out)
    elif config.out.exists():
        raise UserError(f"{config.out}: expected a folder for the run, got a file; choose another --out")
    if config.data is None:
        config = replace(config, data=Path("data") / f"synth-{config.size}x{config.frames}")
        assert config.data is not None
        if not (config.data / "dataset.json").exists():
            log.warning("no --data: writing the synthetic set to %s", config.data)
            write_dataset(config.data, size=config.size, frames=config.frames)
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
