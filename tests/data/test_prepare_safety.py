"""The prepare command in trouble: kills, full disks, crashes, repeats and mistakes do no harm."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_clips import encode, prepared_files, prepared_hashes, prepared_rows, stamped_clip
from processes import file_size_limit

from rlv2v.cli import run_command
from rlv2v.data.workers import run_all
from rlv2v.errors import UserError
from rlv2v.files import lock_folder
from rlv2v.prepare import Args, main

CLIP = stamped_clip(range(24))
KILL = """
import os, signal, sys
from rlv2v.data.prepare import convert
stop, jobs, output_frames = getattr(signal, sys.argv.pop(1)), [], convert.output_frames
def killed(*args):
    jobs.append(args)
    for k, frame in enumerate(output_frames(*args)):
        if (len(jobs), k) == (3, 5):
            os.kill(os.getpid(), stop)
        yield frame
convert.output_frames = killed
from rlv2v.prepare import *
run_command(main, Args)
"""
KILL_PARENT = """
import os, signal, sys
from rlv2v.data.prepare import Report
stop, finish = getattr(signal, sys.argv.pop(1)), Report.finish
def killed(*args):
    finish(*args)
    os.kill(0 if stop == signal.SIGINT else os.getpid(), stop)  # 0: the group, as a terminal does it
Report.finish = killed
from rlv2v.prepare import *
run_command(main, Args)
"""


def write_arrays(src: Path, num: int, frames: int) -> None:
    """Write raw clips of noise, 64x96, all different."""
    src.mkdir()
    clip = np.random.default_rng(0).integers(0, 256, (frames, 64, 96, 3), dtype=np.uint8)
    for k in range(num):
        np.save(src / f"{k}.npy", np.roll(clip, k, axis=0))


@pytest.mark.parametrize(
    ("store", "stop"), [("raw", "SIGKILL"), ("video", "SIGINT"), ("raw", "SIGTERM"), ("raw", "SIGHUP")]
)
def test_stopped_in_the_middle_of_a_file_it_goes_on_to_the_same_result(tmp_path: Path, store: str, stop: str) -> None:
    src, out, reference = tmp_path / "src", tmp_path / "out", tmp_path / "reference"
    write_arrays(src, 5, 12)
    main(Args(src, reference, store=store, jobs=1))  # type: ignore[arg-type]
    flags = [str(src), str(out), "--store", store, "--jobs", "1"]
    done = subprocess.run([sys.executable, "-c", KILL, stop, *flags], capture_output=True, text=True)
    if stop == "SIGKILL":
        assert done.returncode == -signal.SIGKILL and list(out.glob("trainX/.*")), "a half file lies there, hidden"
    else:
        assert done.returncode == 128 + getattr(signal, stop) and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == f"{out}: stopped by {stop}; the same command goes on from here"
        assert not list(out.glob("*/.*")), "it leaves no half file"
    made = {name: row for name, row in prepared_files(out).items() if "/." not in name}
    assert len(made) == 2
    main(Args(src, out, store=store, jobs=1))  # type: ignore[arg-type]
    assert prepared_hashes(out) == prepared_hashes(reference) and len(prepared_hashes(out)) == 5
    assert made.items() <= prepared_files(out).items(), "what was complete is not made again"


@pytest.mark.thorough
def test_workers_end_with_a_killed_parent_and_the_next_run_goes_on(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    write_arrays(src, 12, 40)
    main(Args(src, tmp_path / "reference", size=64, store="video", jobs=1))
    flags = [str(src), str(out), "--store", "video", "--jobs", "2"]
    for stop in ("SIGKILL", "SIGINT"):
        command = [sys.executable, "-c", KILL_PARENT, stop, *flags]
        # returns when nobody has its stdout any more: no worker outlives its parent
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
        if stop == "SIGKILL":
            assert done.returncode == -signal.SIGKILL, done.stderr
        else:
            assert done.returncode == 130 and "stopped by SIGINT; the same command goes on" in done.stderr
            assert not list(out.glob("*/.*")), "Ctrl-C leaves no half file"
        assert 0 < len([name for name in prepared_hashes(out) if "/." not in name]) < 12
    made = prepared_files(out)
    main(Args(src, out, size=64, store="video", jobs=1))
    assert prepared_hashes(out) == prepared_hashes(tmp_path / "reference") and len(prepared_hashes(out)) == 12
    assert made.items() <= prepared_files(out).items(), "what was complete is not made again"


class Terminal(io.StringIO):
    """Somebody who types an answer."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def one_video(tmp_path: Path) -> Path:
    """A source folder with `a.mp4`."""
    (tmp_path / "src").mkdir()
    encode(tmp_path / "src" / "a.mp4", CLIP)
    return tmp_path / "src"


def test_a_disk_that_is_too_small(one_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, usage = tmp_path / "out", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refusal = r"are needed, .* are free; free space, use --store video .* or give --yes"
    for stdin, message in ((io.StringIO(), refusal), (Terminal("\n"), "nothing was written")):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(UserError, match=message):
            main(Args(one_video, out, store="raw", jobs=1))
        assert prepared_hashes(out) == {}
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    main(Args(one_video, out, store="raw", jobs=1))
    assert len(prepared_hashes(out)) == 1
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    main(Args(one_video, tmp_path / "yes", store="raw", jobs=1, yes=True))
    assert prepared_hashes(tmp_path / "yes") == prepared_hashes(out)


def test_auto_takes_raw_while_half_the_disk_holds_it_and_stays_with_it(
    one_video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage, raw = shutil.disk_usage(tmp_path), 4096 + CLIP.nbytes
    for free, store, why in ((2 * raw, "raw", "at most 50%"), (2 * raw - 2, "video", "more than 50%")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        main(Args(one_video, tmp_path / store, jobs=1))
        assert f"{store} (raw needs" in (text := capsys.readouterr().out) and why in text
    main(Args(one_video, tmp_path / "raw", jobs=1))
    assert "0 made, 1 already there" in capsys.readouterr().out, "less free disk does not change what was chosen"


@pytest.mark.parametrize("store", ["raw", "video"])
def test_a_full_disk_ends_the_run_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: str
) -> None:
    write_arrays(tmp_path / "src", 1, 40)
    flags = [str(tmp_path / "src"), str(tmp_path / "out"), "--store", store, "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    with file_size_limit(200_000), pytest.raises(SystemExit) as stopped:
        run_command(main, Args)
    assert stopped.value.code == 2 and "File too large; free space or choose another" in capsys.readouterr().err
    assert prepared_hashes(tmp_path / "out") == {}


def test_nothing_is_overwritten(one_video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = one_video, tmp_path / "out"
    encode(src / "b.mp4", CLIP[:9])
    main(Args(src, out, store="raw", jobs=1))
    damaged = out / prepared_rows(out)["a.mp4"]["output"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    encode(src / "b.mp4", CLIP[:12])
    shutil.copy(src / "a.mp4", src / "a.mov")
    (out / ".partial-1-prepared.json").write_text("half a report of a killed run")
    files = prepared_files(out)
    main(Args(src, out, store="raw", jobs=1))
    assert files.items() <= prepared_files(out).items() and len(prepared_files(out)) == 3
    rows, text = prepared_rows(out), capsys.readouterr().out
    assert [row["status"] for row in rows.values()].count("excluded") == 1 and "the same bytes as a.mov" in text
    failed = next(row for row in rows.values() if row["status"] == "failed")
    assert "is there but damaged; remove it" in failed["reason"]
    assert text.count("not from these sources") == 1 and "b-" in text.split("not from these sources")[1].split(";")[0]
    assert sorted(p.name for p in out.iterdir()) == [".lock", "prepared.json", "trainX"]
    (out / "prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared.json: cannot be read as this command's report"):
        main(Args(src, out, store="raw", jobs=1))


def test_mistakes_are_named(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    (src / "empty").mkdir(parents=True)
    (src / "bad\n.mp4").write_text("no")
    for changes, message in (
        ({}, r"src: nothing usable: bad\\n.mp4: cannot be opened.*; empty: a folder without images"),
        ({"src": tmp_path / "none"}, "none: no such folder"),
        ({"size": 0}, "--size: expected 1 to 4096, got 0"),
        ({"fps": 0.0}, "--fps: expected more than 0"),
        ({"fps": float("nan")}, "--fps: expected more than 0"),
        ({"into": "trainA"}, "--into: expected trainX"),
        ({"jobs": -1}, "--jobs: expected 0 to 1024"),
        ({"out": src / "inside"}, "lies in the source folder"),
        ({"out": src / "bad\n.mp4"}, "is a file; expected a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main(Args(**{"src": src, "out": out, "jobs": 1, **changes}))
        assert "\n" not in str(caught.value)
    assert prepared_hashes(out) == {} and prepared_rows(out)["empty"]["status"] == "excluded"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    for name in ("src", "out"):
        (tmp_path / name).mkdir()
    with lock_folder(tmp_path / "out"), pytest.raises(UserError, match=r"out: another run is at work in it \(pid"):
        main(Args(tmp_path / "src", tmp_path / "out", jobs=1))


def crash_on_two(task: int) -> int:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 3:
        raise UserError("three")
    return task


def test_a_crash_costs_one_file() -> None:
    results = dict(run_all(crash_on_two, range(6), 2))
    assert {t: r for t, r in results.items() if not isinstance(r, UserError)} == {t: t for t in (0, 1, 4, 5)}
    assert str(results[3]) == "three" and "its process died" in str(results[2])


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Peak memory of writing 400 frames, 118 MB, against that of 4, each in a process of its own."""
    code = "import resource; from rlv2v.prepare import *; main(tyro.cli(Args)); "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for num in (4, 400):
        src, out = tmp_path / f"src{num}", tmp_path / f"out{num}"
        src.mkdir()
        np.save(src / "a.npy", np.arange(num * 16 * 24 * 3).astype(np.uint8).reshape(num, 16, 24, 3))
        flags = [str(src), str(out), "--store", "raw", "--size", "256", "--jobs", "1"]
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert next(out.glob("trainX/*")).stat().st_size == 128 + num * 256 * 384 * 3
    assert peaks[1] - peaks[0] < 40, f"MiB: {peaks}"
