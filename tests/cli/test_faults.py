"""Tests of what a run survives: kills, signals, a full disk, too little memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from processes import file_size_limit, read_until
from torch.utils._pytree import tree_leaves

from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.runtime.interrupt import Interrupt
from rlv2v.runtime.log import read_metrics
from rlv2v.train import train

STEPS = 5
# Children of a server that has imported everything once, and has no threads that a fork would cut off.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["rlv2v.train"])


def config_of(data: Path, run: Path) -> Config:
    """Return a short run that writes a checkpoint after each step."""
    return Config.of(
        "tiny", data=data, out=run, steps=STEPS, snapshot_seconds=0.0, rl_every=1, replay_alpha=0.6, keep=99
    )


def contents(run: Path) -> list[Any]:
    """Return all that the last checkpoint holds and what was logged, but for the readings of the clock."""
    store = Checkpoints(run, keep=1, num_replicas=1)
    state = store.load(STEPS)
    state["schedule"].pop("seconds")
    logged = [value for line in read_metrics(run / "metrics.jsonl") for value in line.items()]
    # what not every step has is a mean since the last line or the resume
    other = ("seconds", "frames_per_", "time_", "loss_q", "grad_q", "reward", "actor")
    logged = [(name, value) for name, value in logged if not name.startswith(other)]
    return tree_leaves([state, store.load(STEPS, replica_name(0)), logged])


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the contents of a run that nobody kills."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config_of(data, run))
    return contents(run)


def die_before_rename(config: Config, name: str, number: int) -> None:
    """Train, but die before the n-th rename of a file or folder to `name`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "os.rename" and Path(arguments[1]).name == name:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(config)


@pytest.mark.parametrize(
    ("name", "number", "newest"),
    [
        ("00000003", 1, 2),
        pytest.param("config.json", 1, None, marks=pytest.mark.thorough),
        pytest.param("00000000", 1, None, marks=pytest.mark.thorough),
        pytest.param("manifest.json", 4, 2, marks=pytest.mark.thorough),
        pytest.param("model.safetensors", 4, 3, marks=pytest.mark.thorough),
    ],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    data: Path, undisturbed: list[Any], tmp_path: Path, name: str, number: int, newest: int | None
) -> None:
    config = config_of(data, tmp_path / "run")
    process = forkserver.Process(target=die_before_rename, args=(config, name, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = Checkpoints(config.out, keep=1, num_replicas=1)
    assert store.newest() == newest
    train(config.replace(resume=(config.out / "config.json").is_file(), loader_threads=3))
    resumed = contents(config.out)
    assert len(resumed) == len(undisturbed) > 100
    for a, b in zip(resumed, undisturbed, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not list(config.out.rglob(".*.part"))


def start(*flags: object, **options: Any) -> subprocess.Popen[str]:
    return processes.start("-m", "rlv2v.train", *flags, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    (code,), (errors,) = processes.finish(process)
    return code, errors


def tiny(data: Path, run: Path, *flags: object) -> list[object]:
    return ["--preset", "tiny", "--data", data, "--out", run, *flags]


def steps(run: Path) -> list[int]:
    return Checkpoints(run, keep=1, num_replicas=1).steps


def test_a_second_signal_ends_the_process_at_once() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.by == "SIGTERM"
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.thorough
def test_a_signal_while_warming_up_ends_and_the_run_begins_again(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*tiny(data, run, "--warmup-steps", 1000000))
    read_until(process, "warm-up:")
    process.send_signal(signal.SIGINT)
    code, errors = finish(process)
    assert code == 0 and "during the warm-up" in errors, errors
    assert not steps(run)
    path = run / "config.json"
    path.write_text(path.read_text().replace("1000000", "2"))  # or it would take the hours it asks for
    code, errors = finish(start("--resume", "--out", run, "--steps", 2))
    assert code == 0 and "no checkpoint yet" in errors and steps(run)[-1] == 2, errors


@pytest.mark.thorough
@pytest.mark.parametrize(("limit", "saved"), [(20_000, []), (2_000_000, [0])])
def test_a_disk_that_fills_up_while_training(data: Path, tmp_path: Path, limit: int, saved: list[int]) -> None:
    """There is room for no checkpoint, or for the first, which has no moments yet, and not for the second."""
    run = tmp_path / "run"
    with file_size_limit(limit):
        process = start(*tiny(data, run, "--steps", 30, "--snapshot-seconds", 0))
    code, errors = finish(process)
    assert code == 2 and "state.pt" in errors.splitlines()[-1] and "free space" in errors and "Traceback" not in errors
    assert steps(run) == saved and Checkpoints(run, keep=1, num_replicas=1).newest() == (saved or [None])[-1]
    assert not list(run.rglob(".*.p*"))
    code, errors = finish(start("--resume", "--out", run, "--steps", 3))
    assert code == 0 and steps(run)[-1] == 3, errors


@pytest.mark.parametrize("reason", ["not writable", "a file in the way"])
def test_a_folder_that_cannot_be_written_is_refused(data: Path, tmp_path: Path, reason: str) -> None:
    run = Path("/proc/run") if reason == "not writable" else tmp_path / "run"
    if reason != "not writable":
        run.mkdir()
        (run / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=f"{run}.*expected a folder that a run can be written to.*--out"):
        train(config_of(data, run))


@pytest.mark.thorough
def test_too_little_memory_ends_with_what_would_fit(data: Path, tmp_path: Path) -> None:
    flags = ("--size", 128, "--batch-x", 128, "--warmup-steps", 0)
    process = start(
        *tiny(data, tmp_path / "run", *flags),
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (5 * 2**29, 5 * 2**29)),
    )
    code, errors = finish(process)
    last = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors, errors
    assert "out of memory on cpu: a step of this run needs about" in last and "--memory" in last
