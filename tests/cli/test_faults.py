"""Tests of what a run survives: kills, signals, a full disk, too little memory."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import select
import signal
import subprocess
import sys
import termios
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
from rlv2v.data.index import load_manifest
from rlv2v.errors import UserError
from rlv2v.runtime.interrupt import Interrupt, Stop, raised
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


def test_signals_that_come_in_twos_by_themselves_end_nothing_at_once() -> None:
    with Interrupt() as interrupt:
        for name in ("SIGHUP", "SIGHUP", "SIGUSR1", "SIGTERM"):
            signal.raise_signal(getattr(signal, name))
    assert interrupt.by == "SIGHUP"


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
        assert interrupt.by == "" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_is_raised_and_no_other_disturbs_the_tidying() -> None:
    tidied = False
    with pytest.raises(Stop, match="SIGTERM") as stopped, raised():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            tidied = True
    assert tidied and stopped.value.exit_code == 143


def train_in_terminal(config: Config, terminal: str) -> None:
    """Train in a session of its own, which a terminal controls; a file descriptor of stderr is the terminal's."""
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)  # the first one that a session opens controls it
    for stream in range(3):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    train(config)
    sys.stderr.flush()


def test_a_terminal_that_closes_ends_training_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = Config.of("tiny", data=data, out=run, steps=10**6, snapshot_seconds=1e9)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))  # or there is no room for a progress bar
    process = forkserver.Process(target=train_in_terminal, args=(config, os.ttyname(theirs)))
    process.start()
    seen = b""
    while not re.search(rb"[1-9][0-9]*/1000000", seen):  # the progress bar, after a step
        assert process.is_alive(), seen
        seen += os.read(ours, 2**16) if select.select([ours], [], [], 1.0)[0] else b""
    os.close(theirs)
    os.close(ours)
    process.join()
    assert process.exitcode == 0
    assert steps(run)[-1] > 0, "the first checkpoint is of step 0"


STOP_INDEX = """
import os, signal, sys
stop = getattr(signal, sys.argv.pop(1))
from rlv2v.data import index
content_hash = index.content_hash
def stopped(path, *rest):
    if path.name == "big.mp4":
        for _ in range(2):
            os.kill(os.getpid(), stop)
    return content_hash(path, *rest)
index.content_hash = stopped
"""
TRAIN = "from rlv2v.train import *; run_command(main, flags_type(), description=DESCRIPTION)"
LIBRARY = "index.open_dataset(index.Path(sys.argv[1]), frames=4)"


@pytest.mark.parametrize(
    ("program", "name", "code"),
    [
        (TRAIN, "SIGINT", 0),
        pytest.param(TRAIN, "SIGHUP", 0, marks=pytest.mark.thorough),
        (LIBRARY, "SIGTERM", -signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_index_in_the_middle_of_a_file_and_what_it_has_found_stays(
    data: Path, tmp_path: Path, program: str, name: str, code: int
) -> None:
    """Two signals come while the last file, of 8 TB, is hashed: nobody waits for its end."""
    mine, run = tmp_path / "mine", tmp_path / "run"
    for folder in ("trainX", "trainY"):
        (mine / folder).mkdir(parents=True)
        for number, clip in enumerate(sorted((data / folder).glob("*.mp4"))[:2]):
            (mine / folder / f"{number}.mp4").symlink_to(clip)
    with (mine / "trainX" / "big.mp4").open("wb") as file:
        file.truncate(2**43)
    flags = tiny(mine, run) if program is TRAIN else [mine]
    one_core = {min(os.sched_getaffinity(0))}  # and so one file at a time
    process = processes.start(
        "-c", STOP_INDEX + program, name, *flags, preexec_fn=partial(os.sched_setaffinity, 0, one_core)
    )
    assert process.wait(timeout=300) == code
    assert process.stderr is not None
    errors = process.stderr.read()
    assert "Traceback" not in errors and not run.exists()
    if program is TRAIN:
        line = f"stopped by {name} while reading the data; the same command goes on from there"
        assert errors.splitlines() == [line]
    assert load_manifest(mine / "trainX").keys() == {"0.mp4", "1.mp4"}


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
