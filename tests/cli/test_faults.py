"""What a run survives: signals, kills, a full disk, a second run in its folder."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.runtime.log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    return out


@pytest.fixture(autouse=True)
def one_openmp_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(*arguments: object, limit: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "rlv2v.train", *map(str, arguments)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, preexec_fn=limit)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=120)[1]
    return process.returncode, said


def wait_until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to it in time"
        time.sleep(0.02)


def tiny(data: Path, run: Path, *flags: object) -> list[object]:
    return ["--preset", "tiny", "--data", data, "--out", run, *flags]


def steps(run: Path) -> list[int]:
    return Checkpoints(run, keep=1, num_replicas=1).steps


def test_sigterm_saves_and_ends_well(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*tiny(data, run, "--steps", 100000))
    wait_until(lambda: len(read_metrics(run / "metrics.jsonl")) > 1)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 0, said
    assert Checkpoints(run, keep=1, num_replicas=1).newest() == steps(run)[-1] >= 10
    assert said.splitlines()[-1] == (f"stopped by SIGTERM at step {steps(run)[-1]}; go on with --resume --out {run}")


def test_a_second_signal_ends_at_once_and_leaves_the_run_whole(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a step of many seconds: only the second signal can end it within seconds
    process = start(*tiny(data, run, "--size", 128, "--warmup-steps", 0, "--batch-x", 64))
    wait_until(lambda: steps(run) == [0])
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 128 + signal.SIGTERM and time.monotonic() - began < 3
    assert Checkpoints(run, keep=1, num_replicas=1).newest() == 0


def test_a_signal_while_warming_up_ends_and_the_run_begins_again(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*tiny(data, run, "--warmup-steps", 1000000))
    wait_until((run / "config.json").is_file)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert code == 0 and "during the warm-up" in said, said
    assert not steps(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"warmup_steps": 2}))  # or it would take the hour it asks for
    code, said = finish(start("--resume", "--out", run, "--steps", 2))
    assert code == 0 and "no checkpoint yet" in said and steps(run)[-1] == 2, said


def test_two_runs_in_one_folder_are_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*tiny(data, run, "--steps", 100000))
    wait_until(lambda: steps(run))
    for flags in (tiny(data, run), ["--resume", "--out", run]):
        code, said = finish(start(*flags))
        assert code == 2 and ("another run is at work" in said or "holds a run already" in said), said
    code, said = finish(start("--resume", "--out", run))
    assert f"pid {process.pid}" in said, "named"
    process.kill()
    process.communicate()
    code, said = finish(start("--resume", "--out", run, "--steps", steps(run)[-1] + 1))
    assert code == 0, f"a killed run holds nothing: {said}"


def test_a_disk_that_fills_up_while_training(data: Path, tmp_path: Path) -> None:
    """Room for the first checkpoint, which has no moments yet, and not for the second."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    run = tmp_path / "run"
    code, said = finish(start(*tiny(data, run, "--steps", 30, "--snapshot-seconds", 0.5), limit=small_files))
    assert code == 2 and "state.pt" in said.splitlines()[-1] and "free space" in said and "Traceback" not in said
    assert steps(run) == [0] and Checkpoints(run, keep=1, num_replicas=1).newest() == 0
    assert not list(run.rglob(".*.part"))
    code, said = finish(start("--resume", "--out", run, "--steps", 3))
    assert code == 0 and steps(run)[-1] == 3, said


@pytest.mark.parametrize("where", ["/proc/run", "checkpoints"])
def test_a_folder_that_cannot_be_written(data: Path, tmp_path: Path, where: str) -> None:
    run = Path(where) if where.startswith("/") else tmp_path / "run"
    if where == "checkpoints":
        run.mkdir()
        (run / where).write_text("a file")
    code, said = finish(start(*tiny(data, run)))
    assert code == 2 and "--out" in said.splitlines()[-1] and "Traceback" not in said, said


def test_killed_at_any_moment_the_run_ends_as_if_nothing_had_happened(tmp_path: Path, bench_folder: None) -> None:
    """Three of the kills of bench/survive.py: before, at and long after the first checkpoint."""
    import survive

    data, number = tmp_path / "data", 30
    write_dataset(data, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    assert survive.finish(survive.TRAIN + survive.flags(data, tmp_path / "whole", number)) is None
    wanted = survive.contents(tmp_path / "whole", number)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    kills = {tmp_path / f"kill-{after:g}": after for after in (2.0, 4.5, 7.0)}
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda run: survive.kill_and_resume(data, run, number, kills[run]), kills))
    for run, row in zip(kills, rows, strict=True):
        assert row["fault"] is None, row
        assert survive.same(survive.contents(run, number), wanted), row
        again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in again] == [line["step"] for line in lines]
        assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    changed = list(wanted)
    first = next(i for i, value in enumerate(changed) if hasattr(value, "dtype") and value.dtype.is_floating_point)
    changed[first] = changed[first] + 1e-7
    assert not survive.same(changed, wanted), "one bit is seen"


def test_too_little_memory_ends_with_what_would_fit(data: Path, tmp_path: Path) -> None:
    def little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (5 * 2**29, 5 * 2**29))

    flags = ("--size", 128, "--batch-x", 128, "--warmup-steps", 0)
    code, said = finish(start(*tiny(data, tmp_path / "run", *flags), limit=little_memory))
    last = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said, said
    assert "out of memory on cpu: a step of this run needs about" in last and "--memory" in last
