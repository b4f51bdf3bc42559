"""Tests of whole runs on several ranks: they equal one rank, go on with other ranks, and survive the loss of one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, finish, read_until, start
from ranks import free_port, run_ranks, start_ranks

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.runtime.log import read_metrics


def saved(run: Path) -> dict[str, Any]:
    store = Checkpoints(run, keep=1, num_replicas=1)
    return store.load(store.steps[-1])


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """Return the largest relative distance, by norm, of a weight or running average, and its name."""
    largest = (0.0, "none")
    for part in ("nets", "targets", "average"):
        assert ours[part].keys() == theirs[part].keys()
        for name, weight in theirs[part].items():
            gap = (ours[part][name] - weight).norm() / weight.norm().clamp(min=1e-12)
            largest = max(largest, (gap.item(), f"{part}: {name}"))
    return largest


def train_flags(data: Path, out: Path, *flags: object) -> list[object]:
    return ["-m", "rlv2v.train", *(flags or ["--preset", "tiny"]), "--data", data, "--out", out]


@pytest.mark.parametrize("preset", ["default", pytest.param("paper", marks=pytest.mark.thorough)])
def test_two_ranks_are_one_but_for_rounding(data: Path, tmp_path: Path, preset: str) -> None:
    """Compare in float64, where Adam does not turn the rounding of a vanishing gradient into a step."""
    worker = ROOT / "tests" / "runtime" / "ranks_worker.py"
    for num in (1, 2):
        run_ranks(num, worker, data, tmp_path / f"{num}.pt", preset)
    gap, name = distance(torch.load(tmp_path / "2.pt"), torch.load(tmp_path / "1.pt"))
    assert gap <= 1e-7, name


@pytest.mark.thorough
def test_a_run_goes_on_with_fewer_ranks_and_says_what_changes(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(2, *train_flags(data, run))
    store = Checkpoints(run, keep=1, num_replicas=2)
    cursors = [store.load(4, f"replica-0000{n}")["loader"] for n in range(2)]
    errors = run_ranks(1, "-m", "rlv2v.train", "--resume", "--out", run, "--steps", 6)[0]
    assert "on 1 ranks, 2 before" in errors and "not to the bit" in errors
    assert store.steps[-1] == 6 and store.replicas(6) == 2
    assert [store.load(6, f"replica-0000{n}")["loader"]["step"] for n in range(2)] == [c["step"] + 2 for c in cursors]
    # the same as two ranks would have gone on, to rounding: clips, draws, replay
    other = tmp_path / "other"
    run_ranks(2, *train_flags(data, other))
    run_ranks(2, "-m", "rlv2v.train", "--resume", "--out", other, "--steps", 6)
    assert distance(saved(run), saved(other))[0] <= 1e-2


@pytest.mark.thorough
def test_a_run_goes_on_with_ranks_that_cannot_share_its_replicas(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(2, *train_flags(data, run))
    errors = run_ranks(3, "-m", "rlv2v.train", "--resume", "--out", run, "--steps", 6)[0]
    assert "2 replicas do not go evenly into 3 ranks" in errors and "begin empty" in errors
    store = Checkpoints(run, keep=1, num_replicas=3)
    assert store.steps[-1] == 6 and store.replicas(6) == 3
    assert store.load(6, "replica-00000")["loader"]["step"] == 3 + 2, "after all clips that were drawn"


def torchrun(num: int, *arguments: object) -> subprocess.Popen[str]:
    line = ["-m", "torch.distributed.run", f"--nproc-per-node={num}", *arguments]
    return start(*line, start_new_session=True)


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_brings_the_job_back_by_itself(
    data: Path, tmp_path: Path, victim: int, bench_folder: None
) -> None:
    from survive import rank_pid

    run = tmp_path / "run"
    flags = train_flags(data, run, "--preset", "tiny", "--steps", 60, "--snapshot-seconds", 0)
    process = torchrun(2, "--max-restarts=1", f"--master-port={free_port()}", *flags)
    read_until(process, "step=10,")  # each step saves, once the save before is complete
    pid = rank_pid(process.pid, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    codes, errors = finish(process)
    assert codes == [0], errors
    store = Checkpoints(run, keep=1, num_replicas=2)
    assert store.newest() == 60
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == [1, 10, 20, 30, 40, 50, 60]


@pytest.mark.thorough
def test_sigterm_to_one_rank_saves_and_ends_all(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    processes = start_ranks(2, *train_flags(data, run, "--preset", "tiny", "--steps", 100000))
    read_until(processes[0], "step=10,")
    processes[1].send_signal(signal.SIGTERM)  # one rank is enough: they agree
    codes, errors = finish(*processes)
    assert codes == [0, 0], errors
    store = Checkpoints(run, keep=1, num_replicas=2)
    assert store.newest() == store.steps[-1] > 0
    assert "--resume" in errors[0]


@pytest.mark.thorough
def test_patience_ends_all_ranks(data: Path, tmp_path: Path) -> None:
    still = ("--steps", 100, "--snapshot-seconds", 0, "--lr", 1e-12, "--mask-prior", 0, "--patience", 2)
    first, second = run_ranks(2, *train_flags(data, tmp_path / "run", "--preset", "tiny", *still))
    assert "stopped by --patience 2 at step" in first and "stopped" not in second
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "selection.jsonl")][-1] < 10


def two_nodes(*arguments: object) -> list[subprocess.Popen[str]]:
    """Start two torchruns that meet at an address, as on two machines that share the folder of the run."""
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    return [torchrun(1, *meet, *arguments) for _ in range(2)]


@pytest.mark.thorough
def test_two_nodes_are_two_ranks(data: Path, tmp_path: Path) -> None:
    codes, errors = finish(*two_nodes(*train_flags(data, tmp_path / "run")))
    assert codes == [0, 0], errors
    assert saved(tmp_path / "run")["num_ranks"] == 2


@pytest.mark.thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_two_nodes_meet_again_after_a_loss(data: Path, tmp_path: Path, victim: int, bench_folder: None) -> None:
    """One node restarts its rank and counts it; the other sees new members, and counts nothing."""
    from survive import rank_pid

    run = tmp_path / "run"
    flags = train_flags(data, run, "--preset", "tiny", "--steps", 30, "--snapshot-seconds", 0)
    nodes = two_nodes("--max-restarts=1", *flags)
    first = read_until(nodes[0], "step=10,", nodes[1])  # which of them has rank 0
    pid = rank_pid(nodes[(first + victim) % 2].pid, victim)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    codes, errors = finish(*nodes)
    assert codes == [0, 0], errors
    assert Checkpoints(run, keep=1, num_replicas=2).newest() == 30
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == [1, 10, 20, 30]
