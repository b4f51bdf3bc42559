"""`python -m rlv2v.train`: RL-V2V-GAN, from a folder of videos to a translator.

Alone, or as one rank of `torchrun -m rlv2v.train`. Top to bottom: the ranks, the run's folder and data, what is learned
(`rlv2v.method.step`), the warm-up (section 6.2) or the checkpoint to go on from, the loop, the end.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from rlv2v.checkpoint.export import pack_translators
from rlv2v.checkpoint.resume import restore, save, settle_replicas
from rlv2v.checkpoint.run_folder import create_run_folder, prepare_folder
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.loader import Loader
from rlv2v.errors import UserError
from rlv2v.method.clips import Clips
from rlv2v.method.memory import advise, out_of_memory
from rlv2v.method.pretrain import warm_up
from rlv2v.method.samples import open_data, pick_samples, render_samples
from rlv2v.method.step import Algorithm
from rlv2v.runtime.distributed import StepControl, World, connect, restarts
from rlv2v.runtime.interrupt import Interrupt
from rlv2v.runtime.log import RunLog
from rlv2v.runtime.nan_guard import NanGuard, check_weights
from rlv2v.runtime.timer import StepTimer

LOG_EVERY = 10  # steps
log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train as `config` says, in `config.out`; see the module.

    Raises:
        UserError: a setting, folder, file or checkpoint that the user can mend; a loss that is no number; no memory.
    """
    config.check()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    with Interrupt() as interrupted:
        world = connect(config.device)
        try:
            learn(config, world, interrupted)
            world.close()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"out of memory on {world.device}: {advise(config, world.device)}") from None
        finally:
            world.abort()


def learn(config: Config, world: World, interrupted: Interrupt) -> None:
    """One rank's part of the run."""
    # the run's folder and data; torchrun starts a job that it brings back with the same flags
    device = world.device
    if config.decode == "gpu" and device.type != "cuda":
        raise UserError(f"--decode gpu: expected to train on a CUDA device, got {device}; use --decode cpu")
    if restarts() and (config.out / "config.json").is_file():
        config = replace(config, resume=True)
    config = settle_replicas(world.broadcast_object(lambda: prepare_folder(config)), world.size)
    assert config.replicas is not None
    dataset = world.rank0_first(lambda: open_data(config))
    share = config.replicas // world.size
    loader = Loader(
        dataset,
        batch={
            "x": share * config.batch_x,
            "y": share * config.batch_y * (1 if dataset.sets["z"] else 2),
            "z": share * config.batch_z,
            "s": share * config.batch_s,
        },
        frames=config.frames,
        size=config.size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        augment=config.augment,
        threads=config.loader_threads,
        device=config.decode,
    )
    algorithm = Algorithm(config, device, rank=world.rank, num_ranks=world.size)
    schedule = algorithm.schedule

    with ExitStack() as stack:
        stack.enter_context(closing(loader))
        if world.first:
            stack.enter_context(create_run_folder(config))
        world.barrier()
        store = Checkpoints(config.out, keep=config.keep, num_replicas=config.replicas, first=world.first)
        if world.first:
            store.tidy()

        resumed = config.resume and restore(store, algorithm, loader, world)
        if config.resume and not resumed and world.first:
            log.warning("%s: no checkpoint yet; starting from the beginning", config.out)
        if not resumed:
            # D, G, P = pre-trained; Q' = Q, pi' = pi                                     (Algorithm 1, first lines)
            seconds = warm_up(algorithm.nets, dataset, config, world, lambda: bool(interrupted.by))
            if seconds is None:
                tell_stopped(interrupted, "during the warm-up", config, world)
                return
            schedule.seconds = seconds
            algorithm.start()

        began = time.monotonic() - schedule.seconds
        snapshot_at = schedule.seconds + config.snapshot_seconds
        watch, clock, samples = NanGuard(device), StepTimer(device), pick_samples(config) if world.first else []
        run_log = None
        if world.first:
            frames = world.size * sum(
                num * (1 if name == "s" else config.frames) for name, num in loader.sampler.batch.items()
            )
            run_log = RunLog(
                config.out, step=schedule.step, seconds=schedule.seconds, total=config.length, frames=frames
            )
            stack.enter_context(closing(run_log))

        def snapshot() -> None:
            clock.mark("")
            watch.read(everything=True)
            check_weights(algorithm.nets.named_children(), schedule.step)
            metric, beside = None, dict[str, bytes]()
            if run_log:
                g = algorithm.average if config.average else algorithm.nets
                rows, metric = render_samples(g.g_y, config, samples)
                run_log.sample_grid(config.out / "samples" / f"{schedule.step:08d}.png", rows)
                metric = schedule.remaining_gap.item() if metric is None and schedule.step else metric
                beside["model.safetensors"] = pack_translators(g.g_x, g.g_y, config)
                if metric is not None and (store.best is None or metric < store.best[1]):
                    beside["best.safetensors"] = beside["model.safetensors"]
            save(store, algorithm, loader, world, metric=metric, beside=beside)
            clock.mark("checkpoint")

        if not resumed:
            snapshot()
        control = world.all_agree(StepControl(False, schedule.seconds, False))
        while schedule.progress < 1.0 and not control.stop:
            clock.mark("host")
            clips = Clips.of(next(loader), device, config.per_frame)
            clock.mark("data")
            told = algorithm.step(clips, clock.mark)
            now = time.monotonic() - began
            due = now >= snapshot_at
            snapshot_at = math.inf if due else snapshot_at  # asked for; ranks may agree to it a step later
            control = world.all_agree(StepControl(bool(interrupted.by), now, due))
            told |= algorithm.advance(control.seconds, told.pop("distance"))
            watch.tell(schedule.step, told)
            clock.step()
            logs = schedule.step % LOG_EVERY == 0 or schedule.step == 1 or schedule.progress >= 1.0
            values = watch.read(everything=logs)
            clock.mark("host")
            if logs and run_log:
                run_log.write(schedule.step, schedule.seconds, values | clock.read())
            if run_log:
                run_log.advance(schedule.step, schedule.seconds)
            store.check()
            if control.save:
                snapshot()
                snapshot_at = schedule.seconds + config.snapshot_seconds
        snapshot()
        store.wait()
        world.barrier()
    if control.stop:
        tell_stopped(interrupted, f"at step {schedule.step}", config, world)


def tell_stopped(interrupted: Interrupt, where: str, config: Config, world: World) -> None:
    """Say how to go on with a run that was asked to end."""
    if world.first:
        by = interrupted.by or "another rank"
        print(f"stopped by {by} {where}; go on with --resume --out {config.out}", file=sys.stderr)


def main(config: Config) -> None:
    """Train; the log goes to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    train(config)


if __name__ == "__main__":
    run_command(main, Config, Config.from_arguments)
