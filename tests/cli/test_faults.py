"""Tests of what a run survives: kills, signals, a full disk, too little memory, a second run, files of old versions."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import read_until
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

import rlv2v.evaluate
import rlv2v.report
import rlv2v.translate
from rlv2v.checkpoint.store import Checkpoints, replica_name
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError
from rlv2v.runtime.interrupt import Interrupt
from rlv2v.runtime.log import read_metrics
from rlv2v.train import train

STEPS = 5
# Children of a server that has imported everything once, and has no threads that a fork would cut off.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["rlv2v.train"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    return out


def config_of(data: Path, run: Path) -> Config:
    """Return a short run that writes a checkpoint after each step."""
    return Config.of(
        "tiny", data=data, out=run, steps=STEPS, snapshot_seconds=0.0, rl_every=1, replay_alpha=0.6, keep=99
    )


def contents(run: Path) -> list[Any]:
    """Return all that the last checkpoint holds but the clock's reading, and the losses that were logged."""
    store = Checkpoints(run, keep=1, num_replicas=1)
    state = store.load(STEPS)
    state["schedule"].pop("seconds")
    lines = [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]
    return tree_leaves([state, store.load(STEPS, replica_name(0)), lines])


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
    process = processes.Process(target=die_before_rename, args=(config, name, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = Checkpoints(config.out, keep=1, num_replicas=1)
    assert store.newest() == newest
    train(config.replace(resume=(config.out / "config.json").is_file()))
    resumed = contents(config.out)
    assert len(resumed) == len(undisturbed) > 100
    for a, b in zip(resumed, undisturbed, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not list(config.out.rglob(".*.part"))


@pytest.mark.thorough
def test_a_run_that_is_killed_at_any_moment_can_be_resumed(data: Path, tmp_path: Path, bench_folder: None) -> None:
    """Some of the kills of bench/survive.py, by the clock: while it starts, and while it trains."""
    import survive

    for seconds in (2.0, 5.0):
        row = survive.kill_and_resume(data, tmp_path / f"{seconds}", 30, seconds)
        assert row["fault"] is None, row


def start(*arguments: object, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlv2v.train", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    errors = process.communicate(timeout=240)[1]
    return process.returncode, errors


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
def test_sigterm_saves_and_ends_well(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*tiny(data, run, "--steps", 100000))
    read_until(process, "step=10,")
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code == 0, errors
    assert Checkpoints(run, keep=1, num_replicas=1).newest() == steps(run)[-1] >= 10
    assert errors.splitlines()[-1] == f"stopped by SIGTERM at step {steps(run)[-1]}; go on with --resume --out {run}"


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
def test_two_runs_in_one_folder_are_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*tiny(data, run, "--steps", 100000, "--snapshot-seconds", 0))
    read_until(process, "step=10,")  # each step saves, once the save before is complete
    code, errors = finish(start(*tiny(data, run)))
    assert code == 2 and "holds a run already" in errors, errors
    code, errors = finish(start("--resume", "--out", run))
    assert code == 2 and "another run is at work" in errors and f"pid {process.pid}" in errors, errors
    process.kill()
    process.communicate()
    code, errors = finish(start("--resume", "--out", run, "--steps", steps(run)[-1] + 1))
    assert code == 0, f"a killed run holds nothing: {errors}"


@pytest.mark.thorough
def test_a_disk_that_fills_up_while_training(data: Path, tmp_path: Path) -> None:
    """There is room for the first checkpoint, which has no moments yet, and not for the second."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    run = tmp_path / "run"
    code, errors = finish(start(*tiny(data, run, "--steps", 30, "--snapshot-seconds", 0), limit=small_files))
    assert code == 2 and "state.pt" in errors.splitlines()[-1] and "free space" in errors and "Traceback" not in errors
    assert steps(run) == [0] and Checkpoints(run, keep=1, num_replicas=1).newest() == 0
    assert not list(run.rglob(".*.part"))
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
    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (5 * 2**29, 5 * 2**29))

    flags = ("--size", 128, "--batch-x", 128, "--warmup-steps", 0)
    code, errors = finish(start(*tiny(data, tmp_path / "run", *flags), limit=little_memory))
    last = errors.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in errors, errors
    assert "out of memory on cpu: a step of this run needs about" in last and "--memory" in last


# files of an older version


def age(run: Path) -> None:
    """Rewrite a run as version 1 wrote it: a flat config, and version 1 in the model."""
    path, model = run / "config.json", run / "model.safetensors"
    config = json.loads(path.read_text())
    with safe_open(model, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, model, {"config": path.read_text(), "version": "1"})
    sections = [section for section in config.values() if isinstance(section, dict)]
    flat = {name: value for section in [config, *sections] for name, value in section.items()}
    path.write_text(json.dumps(flat | {"data": "data"}))


@pytest.mark.parametrize("command", ["train", "translate", "evaluate", "report"])
def test_a_run_of_an_older_version_is_refused_in_one_line(
    data: Path, tmp_path: Path, tiny_run: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "model.safetensors"):
        (run / name).write_bytes((tiny_run / name).read_bytes())
    age(run)
    source = next((data / "testX").iterdir())
    calls: dict[str, tuple[Any, Any]] = {
        "train": (lambda _: train(Config.of("tiny", out=run, resume=True)), Config),
        "translate": (rlv2v.translate.main, rlv2v.translate.Args(run, source, tmp_path / "out.mp4", device="cpu")),
        "evaluate": (rlv2v.evaluate.main, rlv2v.evaluate.Args(run, data, device="cpu")),
        "report": (rlv2v.report.main, rlv2v.report.Args(run, data=data, device="cpu")),
    }
    main, args = calls[command]
    with pytest.raises(UserError, match=r"version.*train anew"):
        main(args)
    assert not (tmp_path / "out.mp4").exists() and not (run / "report").exists()
