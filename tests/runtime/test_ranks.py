"""N ranks are one rank with N times the batch; a run goes on with other ranks; a rank that dies is brought back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT, free_port, run_ranks, start_ranks

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.runtime.log import read_metrics

PAPER = ["--preset", "paper", "--size", 16, "--frames", 4, "--widths", 4, 8, "--disc-widths", 4, 8]
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    return out


def saved(run: Path) -> dict[str, Any]:
    store = Checkpoints(run, keep=1, num_replicas=1)
    return store.load(store.steps[-1])


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """The largest relative distance, by norm, of a weight or running average, and which."""
    found = (0.0, "none")
    for part in ("nets", "targets", "average"):
        assert ours[part].keys() == theirs[part].keys()
        for name, weight in theirs[part].items():
            gap = (ours[part][name] - weight).norm() / weight.norm().clamp(min=1e-12)
            found = max(found, (gap.item(), f"{part}: {name}"))
    return found


def train_flags(data: Path, out: Path, *flags: object) -> list[object]:
    return ["-m", "rlv2v.train", *(flags or ["--preset", "tiny"]), "--data", data, "--out", out]


@pytest.mark.parametrize(
    ("flags", "limit"), [([*PAPER, "--warmup-steps", 2], 1e-5), (["--preset", "tiny", "--rl-every", 1], 1e-4)]
)
def test_two_ranks_are_one_with_twice_the_batch(data: Path, tmp_path: Path, flags: list[object], limit: float) -> None:
    """On one of the first seeds: on some, rounding puts a pixel across the kink of a LeakyReLU or an L1."""
    distances = []
    for seed in range(4):
        run = [*flags, "--steps", 5, "--replicas", 2, "--seed", seed]
        for num in (1, 2):
            run_ranks(num, train_flags(data, tmp_path / f"{seed}-{num}", *run), ENVIRONMENT)
        one, two = saved(tmp_path / f"{seed}-1"), saved(tmp_path / f"{seed}-2")
        assert one["schedule"]["step"] == two["schedule"]["step"] == 5
        distances.append(distance(two, one))
        assert distances[-1][0] < 0.1
        for name in ("gap", "floor", "whole_gap"):
            torch.testing.assert_close(two["schedule"][name], one["schedule"][name], rtol=1e-4, atol=1e-5)
        if distances[-1][0] <= limit:
            return
    raise AssertionError(distances)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_two_ranks_are_one_but_for_rounding(data: Path, tmp_path: Path, preset: str) -> None:
    """In float64, where Adam does not turn the rounding of a vanishing gradient into a step."""
    worker = ROOT / "tests" / "runtime" / "ranks_worker.py"
    for num in (1, 2):
        run_ranks(num, [worker, data, tmp_path / f"{num}.pt", preset], ENVIRONMENT)
    gap, name = distance(torch.load(tmp_path / "2.pt"), torch.load(tmp_path / "1.pt"))
    assert gap <= 1e-7, name


def test_a_run_goes_on_with_fewer_ranks_and_says_what_changes(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(2, train_flags(data, run), ENVIRONMENT)
    before = Checkpoints(run, keep=1, num_replicas=2)
    cursors = [before.load(4, f"replica-0000{n}")["loader"] for n in range(2)]
    said = run_ranks(1, ["-m", "rlv2v.train", "--resume", "--out", run, "--steps", 6], ENVIRONMENT)[0]
    assert "on 1 ranks, 2 before" in said and "not to the bit" in said
    again = Checkpoints(run, keep=1, num_replicas=2)
    assert again.steps[-1] == 6 and again.replicas(6) == 2
    assert [again.load(6, f"replica-0000{n}")["loader"]["step"] for n in range(2)] == [c["step"] + 2 for c in cursors]
    # the same as two ranks would have gone on, to rounding: clips, draws, replay
    other = tmp_path / "other"
    run_ranks(2, train_flags(data, other), ENVIRONMENT)
    run_ranks(2, ["-m", "rlv2v.train", "--resume", "--out", other, "--steps", 6], ENVIRONMENT)
    assert distance(saved(run), saved(other))[0] <= 1e-2


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_a_run_goes_on_with_ranks_that_cannot_share_its_replicas(
    data: Path, tmp_path: Path, before: int, after: int
) -> None:
    run = tmp_path / "run"
    run_ranks(before, train_flags(data, run), ENVIRONMENT)
    said = run_ranks(after, ["-m", "rlv2v.train", "--resume", "--out", run, "--steps", 6], ENVIRONMENT)[0]
    assert f"{before} replicas do not go evenly into {after} ranks" in said
    assert ("dropped" if after < before else "begin empty") in said
    store = Checkpoints(run, keep=1, num_replicas=after)
    assert store.steps[-1] == 6 and store.replicas(6) == after
    cursor = store.load(6, "replica-00000")["loader"]
    assert cursor["step"] == -(-4 * before // after) + 2, "after all clips that were drawn"


def test_replicas_must_go_evenly_into_the_ranks(data: Path, tmp_path: Path) -> None:
    processes = start_ranks(2, train_flags(data, tmp_path / "run", "--preset", "tiny", "--replicas", 3), ENVIRONMENT)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("--replicas" in text and "Traceback" not in text for text in said)
    assert not (tmp_path / "run").exists()


def torchrun(num: int, *arguments: object, **how: Any) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num}", *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, **how)


def wait_for_step(run: Path, step: int, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(s >= step for s in Checkpoints(run, keep=1, num_replicas=1).steps):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step} after {seconds} s")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_brings_the_job_back_by_itself(
    data: Path, tmp_path: Path, victim: int, bench_folder: None
) -> None:
    from survive import rank_pid

    run = tmp_path / "run"
    flags = train_flags(data, run, "--preset", "tiny", "--steps", 60, "--snapshot-seconds", 0.5)
    process = torchrun(2, "--max-restarts=1", f"--master-port={free_port()}", *flags)
    wait_for_step(run, 5)
    pid = rank_pid(process.pid, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    store = Checkpoints(run, keep=1, num_replicas=2)
    assert store.newest() == 60
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == [1, 10, 20, 30, 40, 50, 60]


def test_sigterm_to_all_ranks_saves_and_ends(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_ranks(2, train_flags(data, run, "--preset", "tiny", "--steps", 100000), ENVIRONMENT)
    wait_for_step(run, 0)
    time.sleep(1.0)
    processes[1].send_signal(signal.SIGTERM)  # one rank is enough: they agree
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    store = Checkpoints(run, keep=1, num_replicas=2)
    assert store.newest() == store.steps[-1] > 0
    assert "--resume" in said[0]


def test_two_nodes_are_two_ranks(data: Path, tmp_path: Path) -> None:
    """Two torchruns that meet at an address, as on two machines that share the folder of the run."""
    run, where = tmp_path / "run", f"127.0.0.1:{free_port()}"
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={where}", "--rdzv-id=test"]
    nodes = [torchrun(1, *meet, *train_flags(data, run)) for _ in range(2)]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert saved(run)["num_ranks"] == 2
