"""The prepare command in trouble: kills, full disks, crashes, repeats and mistakes do no harm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from prepare_clips import N, contents, encode, rows_of, stamped, state

from rlv2v.data.workers import run_all
from rlv2v.errors import UserError
from rlv2v.prepare import Args, main


class Stdin:
    """A terminal on which `answer` is typed, or none."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return self.answer is not None

    def readline(self) -> str:
        assert self.answer is not None, "nobody may be asked"
        return self.answer


def wait_for_group(group: int) -> None:
    """Until no process of the group is left: workers must not outlive their parent."""
    end = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < end, "a worker outlives its parent"
            time.sleep(0.02)


def test_killed_in_the_middle_it_goes_on_to_the_same_result(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    clip = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    for num in range(12):
        np.save(src / f"{num}.npy", np.roll(clip, num, axis=0))
    main(Args(src, tmp_path / "whole", size=64, store="video", jobs=1))
    command = [sys.executable, "-m", "rlv2v.prepare", str(src), str(out), "--store", "video", "--jobs", "2"]
    for stop in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        before = len(list(out.glob("trainX/[0-9]*.mp4")))
        end = time.monotonic() + 60
        while len(list(out.glob("trainX/[0-9]*.mp4"))) <= before or not list(out.glob("trainX/.*")):
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.002)
        if stop == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, stop)  # as a terminal does it
        said = process.communicate(timeout=30)[1].decode()
        wait_for_group(process.pid)
        done = contents(out)
        if stop == signal.SIGINT:
            assert process.returncode == 130 and "stopped; the same command goes on" in said
            assert not list(out.glob("*/.*")), "Ctrl-C leaves no half file"
        assert 0 < len([name for name in done if "/." not in name]) < 12
    kept = state(out)
    main(Args(src, out, size=64, store="video", jobs=1))
    assert contents(out) == contents(tmp_path / "whole") and len(contents(out)) == 12
    assert all(state(out)[name] == value for name, value in kept.items()), "what was whole is not made again"


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    encode(src / "a.mp4", stamped())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(sys, "stdin", Stdin(None))
    with pytest.raises(UserError, match=r"are needed, .* are free; free space, use --store video .* or give --yes"):
        main(Args(src, out, store="raw", jobs=1))
    assert contents(out) == {}

    monkeypatch.setattr(sys, "stdin", Stdin("\n"))
    with pytest.raises(UserError, match="nothing was written"):
        main(Args(src, out, store="raw", jobs=1))
    assert contents(out) == {}
    monkeypatch.setattr(sys, "stdin", Stdin("y\n"))
    main(Args(src, out, store="raw", jobs=1))
    assert len(contents(out)) == 1
    monkeypatch.setattr(sys, "stdin", Stdin(None))
    main(Args(src, tmp_path / "yes", store="raw", jobs=1, yes=True))
    assert contents(tmp_path / "yes") == contents(out)


def test_auto_takes_raw_while_half_the_disk_holds_it_and_stays_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    encode(src / "a.mp4", stamped())
    usage, raw = shutil.disk_usage(tmp_path), 4096 + N * 64 * 96 * 3
    for free, store, why in ((2 * raw, "raw", "at most 50%"), (2 * raw - 2, "video", "more than 50%")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        main(Args(src, tmp_path / store, jobs=1))
        assert f"{store} (raw needs" in (said := capsys.readouterr().out) and why in said
    main(Args(src, tmp_path / "raw", jobs=1))
    assert "0 made, 1 already there" in capsys.readouterr().out, "less free disk does not change what was chosen"


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    np.save(tmp_path / "src" / "a.npy", np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8))
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    run = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from rlv2v.prepare import *; run_command(main, Args)"
    for store in ("raw", "video"):
        flags = [str(tmp_path / "src"), str(tmp_path / store), "--store", store, "--jobs", "1"]
        done = subprocess.run([sys.executable, "-c", limit + run, *flags], capture_output=True, text=True)
        assert done.returncode == 2 and "File too large; free space or choose another" in done.stderr, done.stderr
        assert contents(tmp_path / store) == {}


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    encode(src / "a.mp4", stamped())
    encode(src / "b.mp4", stamped(9))
    main(Args(src, out, store="raw", jobs=1))
    damaged = out / rows_of(out)["a.mp4"]["output"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    encode(src / "b.mp4", stamped(12))
    shutil.copy(src / "a.mp4", src / "a.mov")
    before = state(out)
    main(Args(src, out, store="raw", jobs=1))
    assert all(state(out)[name] == value for name, value in before.items()) and len(state(out)) == 3
    rows, said = rows_of(out), capsys.readouterr().out
    assert [row["status"] for row in rows.values()].count("excluded") == 1 and "the same bytes as a.mov" in said
    failed = next(row for row in rows.values() if row["status"] == "failed")
    assert "is there but damaged; remove it" in failed["reason"]
    assert said.count("not from these sources") == 1 and "b-" in said.split("not from these sources")[1].split(";")[0]
    (out / "prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared.json: cannot be read as this command's report"):
        main(Args(src, out, store="raw", jobs=1))


def test_mistakes_are_named(tmp_path: Path) -> None:
    src = tmp_path / "src"
    (src / "empty").mkdir(parents=True)
    (src / "bad.mp4").write_text("no")
    out = tmp_path / "out"
    for changes, message in (
        ({}, r"src: nothing usable: bad.mp4: cannot be opened.*; empty: a folder without images"),
        ({"src": tmp_path / "none"}, "none: no such folder"),
        ({"size": 0}, "--size: expected 1 to 4096, got 0"),
        ({"fps": 0.0}, "--fps: expected more than 0"),
        ({"fps": float("nan")}, "--fps: expected more than 0"),
        ({"into": "trainA"}, "--into: expected trainX"),
        ({"jobs": -1}, "--jobs: expected 0 to 1024"),
        ({"out": src / "inside"}, "lies in the source folder"),
        ({"out": src / "bad.mp4"}, "is a file; expected a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main(Args(**{"src": src, "out": out, "jobs": 1, **changes}))
        assert "\n" not in str(caught.value)
    assert contents(out) == {} and rows_of(out)["empty"]["status"] == "excluded"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "src").mkdir()
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another prepare is writing there"):
        main(Args(tmp_path / "src", tmp_path / "out", jobs=1))
    os.close(held)


def crash_on_two(task: int) -> int:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 3:
        raise UserError("three")
    return task


def test_a_crash_costs_one_file() -> None:
    found = dict(run_all(crash_on_two, range(6), 2))
    assert {t: r for t, r in found.items() if not isinstance(r, UserError)} == {t: t for t in (0, 1, 4, 5)}
    assert str(found[3]) == "three" and "its process died" in str(found[2])


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Peak memory of writing 400 frames, 118 MB, beside that of 4, each in a process of its own."""
    run = "import resource; from rlv2v.prepare import *; main(tyro.cli(Args)); "
    run += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for num in (4, 400):
        src, out = tmp_path / f"src{num}", tmp_path / f"out{num}"
        src.mkdir()
        np.save(src / "a.npy", np.arange(num * 16 * 24 * 3).astype(np.uint8).reshape(num, 16, 24, 3))
        flags = [str(src), str(out), "--store", "raw", "--size", "256", "--jobs", "1"]
        done = subprocess.run([sys.executable, "-c", run, *flags], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert next(out.glob("trainX/*")).stat().st_size == 128 + num * 256 * 384 * 3
    assert peaks[1] - peaks[0] < 40, f"MiB: {peaks}"
