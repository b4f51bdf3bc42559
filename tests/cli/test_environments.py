"""Odd places to run in: nobody's home, folders that nobody can write to, names that are not UTF-8, no shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command, refusal
from processes import ROOT, start

from rlv2v.checkpoint.store import Checkpoints

# The files stay root's, among which Python itself may be: only the identity is lost.
NOBODY = """
import ctypes, os, pwd, runpy, sys
os.setresuid(54321, 54321, 0)
ctypes.CDLL(None).setfsuid(0)
try:
    pwd.getpwuid(os.getuid())
except KeyError:
    pass
else:
    raise AssertionError("this uid has a name")
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
NO_SHARED_MEMORY = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def latin(folder: Path, name: str) -> Path:
    """Return a path in a folder whose name is Latin-1, as Python reads it where names are UTF-8."""
    return folder / os.fsdecode(name.encode("latin-1"))


@pytest.fixture
def odd(data: Path, tmp_path: Path) -> Path:
    """A small dataset with Latin-1 names of folders and files, one of them broken."""
    root = latin(tmp_path, "dätå")
    for name in ("trainX", "trainY", "testX"):
        latin(root / name, "é").mkdir(parents=True)
        for number, clip in enumerate(sorted((data / name).glob("*.mp4"))[:3]):
            shutil.copy(clip, latin(root / name / os.fsdecode(b"\xe9"), f"ü{number}.mp4"))
        latin(root / name, "brökén.mp4").write_bytes(b"no video")
    return root


def test_names_that_are_not_utf8_train_and_go_on(odd: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"
    for flags in (("--preset", "tiny", "--data", odd, "--steps", 1), ("--resume", "--steps", 2)):
        code, _, err = command("train", *flags, "--out", run)
        assert code == 0, err
    assert Checkpoints(run, keep=1, num_replicas=1).steps[-1] == 2
    clip = next(latin(odd / "trainX", "é").iterdir())
    clip.unlink()
    line = refusal(command("train", "--resume", "--steps", 3, "--out", run))
    assert r"trainX/\udce9/\udcfc" in line and line.endswith("vanished; restore it, or start a new run by --from")
    line = refusal(command("train", "--preset", "tiny", "--data", odd, "--out", latin(tmp_path, "rün")))
    assert line.endswith(r"r\udcfcn: expected a name in UTF-8; choose another folder")


@pytest.mark.thorough
def test_names_that_are_not_utf8_are_printed_to_any_stdout(odd: Path, tmp_path: Path) -> None:
    out = latin(tmp_path, "öut")
    process = start("-m", "rlv2v.prepare", odd, out, "--size", 16, "--jobs", 1, stdout=subprocess.PIPE)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and r"\udcf6ut: 9 made" in printed, errors
    code = "import sys; from rlv2v import cli\ncli.run_command(lambda _: print('caf\\udce9'), dict[str, str])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b"caf\\udce9\n"


@needs_root
@pytest.mark.thorough
def test_without_a_home_and_a_name_of_the_user_everything_works(data: Path, tmp_path: Path) -> None:
    run, source = tmp_path / "run", next((data / "testX").glob("*.mp4"))
    nameless = [word for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME") for word in ("-u", name)]
    for line in (
        ("rlv2v.train", "--preset", "tiny", "--data", data, "--out", run, "--steps", 1),
        ("rlv2v.translate", run, source, tmp_path / "out.mp4"),
        ("rlv2v.report", run, "--data", data, "--clips", 1),
    ):
        done = subprocess.run(
            ["env", *nameless, sys.executable, "-c", NOBODY, *map(str, line)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.thorough
def test_without_shared_memory_prepare_reads_one_file_at_a_time(data: Path, tmp_path: Path) -> None:
    namespace = ["unshare", "--mount", "sh", "-c", NO_SHARED_MEMORY, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    flags = ["-m", "rlv2v.prepare", data / "testX", tmp_path / "out", "--size", "16", "--jobs", "2"]
    done = subprocess.run([*namespace, sys.executable, *map(str, flags)], capture_output=True, text=True, cwd=ROOT)
    (line,) = [line for line in done.stderr.splitlines() if "semaphores" in line]
    assert done.returncode == 0 and "one file at a time is read" in line and "0 left out" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "tiny"), r"^rlv2v.train: data/synth-16x4: cannot be written: .*; name a dataset by --data$"),
        (("--preset", "tiny", "--data", "DATA"), "^rlv2v.train: runs.*expected a folder that a run can be written to"),
    ],
)
def test_a_working_folder_that_nobody_can_write_to_is_named(
    data: Path, flags: tuple[str, ...], message: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc")
    line = refusal(command("train", *(data if flag == "DATA" else flag for flag in flags)))
    assert re.search(message, line), line
