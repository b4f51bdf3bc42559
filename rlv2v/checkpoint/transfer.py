"""The start of a run from an earlier run's weights (`--from`): what is taken over, and what has to fit."""

from __future__ import annotations

from pathlib import Path

from torch.optim import Adam

from rlv2v.checkpoint.resume import load_states
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method.trainer import Trainer
from rlv2v.runtime.distributed import World

SHAPING = ("method", "head", "patch", "widths", "disc_widths", "bins", "disc_norm")
"""The settings that the shapes of the weights follow from."""
WEIGHTS = ("nets", "targets", "average")


def require_fit(config: Config) -> None:
    """Raise UserError if `config.from_run` holds no checkpoint, or one whose weights cannot be those of this run."""
    run = config.from_run
    if run is None:
        return
    saved = Config.read(run / "config.json")
    for flag in SHAPING:
        if saved.get(flag) != config.get(flag):
            raise UserError(
                f"--{flag.replace('_', '-')}: the run of --from has {saved.get(flag)!r}, got {config.get(flag)!r}, to "
                "which its weights do not fit; give the same or leave out --from"
            )
    if run.resolve() == config.out.resolve():
        raise UserError(f"--from {run}: is the folder of this run too; choose another --out, or go on by --resume")
    if not store_of(run).steps:
        raise UserError(f"--from {run}: expected a run with a checkpoint, found none")


def take_over(trainer: Trainer, run: Path, world: World) -> str:
    """Give a new run the weights of the newest whole checkpoint of an earlier one, and its optimisers' moments.

    The moments come along because without them the first steps are as large as the learning rate allows, whatever the
    gradients. They keep their own count of steps; learning rates and decay are those of the new run. Returns a line
    that says what was taken over.

    Raises:
        UserError: no checkpoint is whole, it does not fit, or the method has no weights that training moves.
    """
    parts = trainer.state_parts
    optimisers = {name: part for name, part in parts.items() if isinstance(part, Adam)}
    if not optimisers:
        raise UserError(f"--from: --method {trainer.config.method} is fitted to its clips anew; leave out --from")
    store = store_of(run)
    step = world.broadcast_object(store.newest)
    assert step is not None
    saved = store.load(step, "state", world.device)
    weights = {name: parts[name] for name in WEIGHTS if name in parts}
    # an earlier run without an average translated by its last weights
    last = {name: saved["nets"][name] for name in parts["average"].state_dict()} if "average" in weights else {}
    load_states(weights, {"average": last} | saved, f"{run}: checkpoint {step}")
    for name, optimiser in optimisers.items():
        if name in saved:
            groups = optimiser.state_dict()["param_groups"]
            load_states({name: optimiser}, {name: saved[name] | {"param_groups": groups}}, f"{run}: checkpoint {step}")
    trainer.schedule.first.copy_(
        saved["schedule"].get("first", trainer.schedule.first)
    )  # how far the domains are apart
    return (
        f"started from {run} at its step {step}: weights and moments are taken over; steps, schedule, replay buffers "
        "and order of clips begin anew, without a warm-up"
    )


def store_of(run: Path) -> Checkpoints:
    """Return the checkpoints of a run, for reading."""
    return Checkpoints(run, keep=1, num_replicas=1)
