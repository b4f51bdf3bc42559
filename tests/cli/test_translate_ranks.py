"""Ranks of torchrun share the videos of one command, and go on after any stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import PATIENCE, finish, start
from ranks import free_port, start_ranks
from resume_cases import assert_same, listing, wave_clip, write_strange_run

from rlv2v.data.writer import write_clip

SHORT_PIECES = "import sys; from rlv2v import cli, translate_file; translate_file.PIECE = 24; cli.main()"
NAMES = ("a.mp4", "b.mp4", "c.mp4", "d.mp4")
PARTS = [f".resume-{name}" for name in NAMES[:2]]
"""Work of the videos that two ranks begin with."""


@pytest.mark.thorough
def test_ranks_share_the_videos_and_the_first_sums_up(tiny_run: Path, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in ("a", "b", "d"):
        np.save(videos / f"{name}.npy", np.zeros((2, 16, 16, 3), np.uint8))
    (videos / "c.npy").write_bytes(b"no video")
    codes, errors = finish(*start_ranks(2, "-m", "rlv2v.translate", tiny_run, videos, out, "--device", "cpu"))
    assert codes == [2, 2], errors
    assert f"3 translated, 0 skipped, 1 failed: {videos / 'c.npy'}" in errors[0]
    assert "b.npy:" in errors[1] and "failed" not in errors[1], "each has its share"
    assert sorted(p.name for p in out.iterdir()) == ["a.mp4", "b.mp4", "d.mp4"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, four videos, of which ranks begin with the long ones, and what two ranks make of them."""
    folder = tmp_path_factory.mktemp("job")
    write_strange_run(folder / "run")
    (folder / "videos").mkdir()
    for name, num in zip(NAMES, (150, 150, 30, 3), strict=True):
        write_clip(folder / "videos" / name, np.stack(wave_clip(num)), 25)
    assert finish(*start_ranks(2, "-c", *translate(folder, folder / "whole")))[0] == [0, 0]
    return folder


def translate(job: Path, out: Path, *flags: str) -> list[object]:
    """Return a program and its arguments: translate all videos, without loss, in short pieces."""
    return [SHORT_PIECES, "translate", job / "run", job / "videos", out, "--lossless", "--device", "cpu", *flags]


def wait_for_work(folder: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Wait until both ranks have saved work on their first video. Raises AssertionError where none comes."""
    end = time.monotonic() + PATIENCE
    while not all((folder / part / "state").exists() for part in PARTS):
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError(finish(*processes))
        time.sleep(0.02)


def assert_whole(folder: Path, whole: Path) -> None:
    assert listing(folder) == listing(whole) == list(NAMES)
    for name in NAMES:
        assert_same(folder / name, whole / name, lossless=True, cuts=0)


@pytest.mark.thorough
@pytest.mark.parametrize(("stop", "num"), [(signal.SIGTERM, 2), (signal.SIGKILL, 1)])
def test_ranks_that_were_stopped_go_on(job: Path, tmp_path: Path, stop: signal.Signals, num: int) -> None:
    """The same as if nothing had happened comes out, by as many ranks as before or another number."""
    out = tmp_path / "out"
    processes = start_ranks(2, "-c", *translate(job, out))
    wait_for_work(out, processes)
    for process in processes:
        process.send_signal(stop)
    codes, errors = finish(*processes)
    if stop == signal.SIGTERM:
        line = f"{out}: stopped by SIGTERM; --resume goes on with the rest"
        assert [error.splitlines()[-1] for error in errors] == [line] * 2 and "Traceback" not in "".join(errors)
        assert codes == [128 + stop] * 2 and listing(out) == PARTS
    else:
        assert codes == [-stop] * 2 and {*PARTS} < {*listing(out)}
    codes, errors = finish(*start_ranks(num, "-c", *translate(job, out, "--resume")))
    assert codes == [0] * num, errors
    assert all(f"{name}: going on after " in "".join(errors) for name in NAMES[:2])
    assert_whole(out, job / "whole")


@pytest.mark.thorough
def test_torchrun_brings_a_job_back_that_lost_a_rank(job: Path, tmp_path: Path, bench_folder: None) -> None:
    from survive import rank_pid

    program, *arguments = translate(job, tmp_path / "out", "--resume")
    (script := tmp_path / "job.py").write_text(str(program))
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1")
    process = start(*torchrun, f"--master-port={free_port()}", script, *arguments, start_new_session=True)
    wait_for_work(tmp_path / "out", [process])
    victim = rank_pid(process.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    codes, errors = finish(process)
    assert codes == [0], errors
    assert "b.mp4: going on after " in errors[0]
    assert_whole(tmp_path / "out", job / "whole")
