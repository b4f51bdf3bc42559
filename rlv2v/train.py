"""`python -m rlv2v.train`: RL-V2V-GAN or a baseline, from a folder of videos to a translator.

It runs alone, or as one rank of `torchrun -m rlv2v.train`. Read it from top to bottom: the ranks, the run's folder and
data, the method's trainer (`rlv2v.method.trainer`), what it does before the first step or the checkpoint to resume,
the loop, the end.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import ExitStack, closing
from typing import Any

import torch

from rlv2v.checkpoint.export import pack_translators
from rlv2v.checkpoint.resume import create_run_folder, restore, save, settle
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.checkpoint.transfer import require_fit, take_over
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.inspect import Stopped
from rlv2v.errors import UserError
from rlv2v.flags import DESCRIPTION, flags_type, resolve
from rlv2v.method.baselines import METHODS
from rlv2v.method.clips import Clips, make_loader, pool_size
from rlv2v.method.memory import advise, with_graphs_that_fit
from rlv2v.method.trainer import Trainer
from rlv2v.metrics.selection import Selection
from rlv2v.runtime.device import out_of_memory
from rlv2v.runtime.distributed import StepControl, World, connect
from rlv2v.runtime.interrupt import Interrupt
from rlv2v.runtime.log import RunLog
from rlv2v.runtime.nan_guard import NanGuard, check_weights
from rlv2v.runtime.timer import StepTimer

LOG_EVERY = 10  # steps
log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train as `config` says, into `config.out`.

    Raises:
        UserError: a setting, folder, file or checkpoint that the user can mend; a NaN or infinite loss; too little
            memory.
    """
    config.check()
    torch.set_num_threads(config.runtime.threads or torch.get_num_threads())
    torch.backends.cudnn.allow_tf32 = config.runtime.tf32
    with Interrupt() as interrupted:
        world = connect(config.runtime.device)
        try:
            run(config, world, interrupted)
            world.close()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"out of memory on {world.device}: {advise(config, world.device)}") from None
        finally:
            world.abort()


def run(config: Config, world: World, interrupted: Interrupt) -> None:
    """Do one rank's part of the run."""
    # the run's folder and data; torchrun restarts a job with the same flags, which must then resume it
    device = world.device
    if config.data.decode == "gpu" and device.type != "cuda":
        raise UserError(f"--decode gpu: expected to train on a CUDA device, got {device}; use --decode cpu")
    if world.restarts and (config.out / "config.json").is_file():
        config = config.replace(resume=True)
    config = world.broadcast_object(lambda: settle(config, world.size))
    if world.first and not config.resume:
        require_fit(config)
    dataset = world.broadcast_object(lambda: open_unless_stopped(config))
    if dataset is None:
        if world.first:
            by = interrupted.by or "a signal"
            print(f"stopped by {by} while reading the data; the same command goes on from there", file=sys.stderr)
        return
    loader = make_loader(config, dataset, world)
    trainer = METHODS[config.method].trainer(with_graphs_that_fit(config, device), device, world.rank, world.size)
    schedule = trainer.schedule

    with ExitStack() as stack:
        stack.enter_context(closing(loader))
        if world.first:
            stack.enter_context(create_run_folder(config))
        world.barrier()
        num_replicas = config.runtime.replicas
        store = Checkpoints(config.out, keep=config.checkpoint.keep, num_replicas=num_replicas, first=world.first)
        if world.first:
            store.tidy()

        resumed = config.resume and restore(store, trainer, loader, world)
        if config.resume and not resumed and world.first:
            log.warning("%s: no checkpoint yet; starting from the beginning", config.out)
        if not resumed:
            # D, G, P = pre-trained; Q' = Q, pi' = pi                                     (Algorithm 1, first lines)
            start = time.monotonic()
            if config.from_run:
                line = take_over(trainer, config.from_run, world)
                if world.first:
                    print(line, file=sys.stderr)
            elif not trainer.pretrain(dataset, world, lambda: bool(interrupted.by)):
                say_stopped(interrupted, "during the warm-up", config, world)
                return
            schedule.seconds = world.broadcast_object(lambda: time.monotonic() - start)

        start = time.monotonic() - schedule.seconds
        checkpoint_at = schedule.seconds + config.checkpoint.snapshot_seconds
        guard, timer = NanGuard(device), StepTimer(device)
        run_log = selection = None
        if world.first:
            lengths = {name: 1 if name == "s" else config.data.frames for name in loader.sampler.batch}
            frames = world.size * sum(num * lengths[name] for name, num in loader.sampler.batch.items())
            run_log = RunLog(
                config.out, step=schedule.step, seconds=schedule.seconds, total=schedule.length, frames=frames
            )
            stack.enter_context(closing(run_log))
            selection = Selection(config, schedule.step, store.best if resumed else None)

        def out_of_patience() -> bool:
            patience = config.checkpoint.patience
            return patience > 0 and world.broadcast_object(
                lambda: selection is not None and selection.num_since_best >= patience
            )

        def checkpoint() -> None:
            timer.mark("")
            guard.read(everything=True)
            check_weights(trainer.nets.named_children(), schedule.step)
            metric, run_files = summarise(trainer, selection, run_log) if run_log and selection else (None, {})
            save(store, trainer, loader, world, metric=metric, run_files=run_files)
            timer.mark("checkpoint")

        if not resumed:
            checkpoint()
        is_stale = out_of_patience()
        control = world.all_agree(StepControl(False, schedule.seconds, False))
        while schedule.progress < 1.0 and not control.stop and not is_stale:
            timer.mark("host")
            clips = Clips.of(next(loader), device, pool=pool_size(config), replicas=len(trainer.replicas))
            timer.mark("data")
            logs = trainer.step(clips, timer.mark)
            seconds = time.monotonic() - start
            due = seconds >= checkpoint_at
            checkpoint_at = math.inf if due else checkpoint_at  # asked for; ranks may agree to it a step later
            control = world.all_agree(StepControl(bool(interrupted.by), seconds, due))
            logs |= trainer.advance(control.seconds)
            guard.record(schedule.step, logs)
            timer.step()
            is_logged = schedule.step % LOG_EVERY == 0 or schedule.step == 1 or schedule.progress >= 1.0
            guard.read(everything=is_logged)
            timer.mark("host")
            if run_log:
                if is_logged:
                    run_log.write(schedule.step, schedule.seconds, guard.summary() | timer.read())
                run_log.advance(schedule.step, schedule.seconds)
            store.check()
            if control.save:
                checkpoint()
                checkpoint_at = schedule.seconds + config.checkpoint.snapshot_seconds
                is_stale = out_of_patience()
        checkpoint()
        store.wait()
        world.barrier()
    if control.stop:
        say_stopped(interrupted, f"at step {schedule.step}", config, world)
    elif is_stale and selection:
        print(selection.say_stale(), file=sys.stderr)


def open_unless_stopped(config: Config) -> Dataset | None:
    """Return the run's dataset, or None if a signal came while it was read."""
    try:
        return open_dataset(config.data.folder, frames=config.data.frames)
    except Stopped:
        return None


def summarise(trainer: Trainer, selection: Selection, run_log: RunLog) -> tuple[float, dict[str, bytes]]:
    """Measure a checkpoint and draw its sample grid; return its criterion and the models that are written with it."""
    config, schedule, g = trainer.config, trainer.schedule, trainer.generators
    rows = selection.measure(schedule.step, schedule.seconds, g.g_y)
    run_log.sample_grid(config.out / "samples" / f"{schedule.step:08d}.png", rows)
    run_log.write_checkpoint(schedule.step, selection.values())
    files = {"model.safetensors": pack_translators(g.g_x, g.g_y, config)}
    if selection.is_best:
        files["best.safetensors"] = files["model.safetensors"]
    return selection.lines[-1]["criterion"], files


def say_stopped(interrupted: Interrupt, moment: str, config: Config, world: World) -> None:
    """Print how to go on with a run that was asked to end."""
    if world.first:
        by = interrupted.by or "another rank"
        print(f"stopped by {by} {moment}; go on with --resume --out {config.out}", file=sys.stderr)


def main(flags: dict[str, Any]) -> None:
    """Train; the log goes to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    train(resolve(flags))


if __name__ == "__main__":
    run_command(main, flags_type(), description=DESCRIPTION)
