"""Tests of checkpoints under failing disks, several ranks, and kills: the old set or the new one, never half of one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import file_size_limit
from store_cases import assert_all_whole, assert_holds, flip_a_bit, hidden_files, one_rank, save, state_of

from rlv2v.checkpoint import store as module
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.errors import UserError
from rlv2v.files import write_atomically

# Children of a server that has imported torch once, and has no threads that a fork would cut off.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["rlv2v.checkpoint.store"])


# failing disks


@contextmanager
def full_disk(file: Path) -> Iterator[None]:
    file.parent.mkdir()
    file.symlink_to("/dev/full")
    yield


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """As an unprivileged user: root may write anywhere."""
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ["EFBIG", "ENOSPC", "EACCES"])
@pytest.mark.parametrize("method", ["check", "wait", "save"])
def test_the_error_of_a_failing_disk_has_its_number_and_names_the_file(
    tmp_path: Path, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # a relative path: the folders above are not for every user
    run = Path("run")
    store, part = one_rank(run), run / "checkpoints" / ".00000002.part"
    save(store, 1)
    failing = {
        "EFBIG": lambda: file_size_limit(2_000_000),
        "ENOSPC": lambda: full_disk(part / "state.pt"),
        "EACCES": lambda: read_only(run / "checkpoints"),
    }[name]
    with failing():
        store.save(2, state_of(2, 1_000_000), {0: {}})
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
    calls: dict[str, Callable[[], None]] = {"save": lambda: store.save(3, state_of(3), {0: {}})}
    with pytest.raises(OSError, match=re.escape(str(part))) as caught:
        calls.get(method, getattr(store, method))()
    assert caught.value.errno == getattr(errno, name)
    assert str(caught.value.filename).startswith(str(part))
    assert not hidden_files(run)
    assert store.newest() == 1
    store.check()  # once
    save(store, 2)  # and there is room again
    assert store.newest() == 2
    assert_holds(store, 1)


def test_a_write_that_fails_leaves_the_old_file_and_names_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"old")
    with file_size_limit(1000), pytest.raises(OSError, match="file") as caught:
        write_atomically(tmp_path / "file", bytes(2000))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


# several ranks


def save_as_the_second_rank(run: Path, steps: list[int]) -> None:
    store = Checkpoints(run, keep=2, num_replicas=3, first=False)
    for step in steps:
        store.save(step, None, {n: {"seen": torch.full((1000 * n,), step)} for n in (1, 2)})
    store.wait()


def test_two_ranks_make_one_checkpoint(tmp_path: Path) -> None:
    other = processes.Process(target=save_as_the_second_rank, args=(tmp_path, [1, 2, 3, 3, 4]))
    other.start()
    store = Checkpoints(tmp_path, keep=2, num_replicas=3)
    for step in (1, 2, 3, 3, 4):
        store.save(step, state_of(step), {0: {"seen": torch.full((3,), step)}}, metric=1.0 * step)
    store.wait()
    other.join(60)
    assert other.exitcode == 0
    assert store.steps == [1, 3, 4]
    for step in store.steps:
        assert store.replicas(step) == 3
        assert_holds(store, step)
        assert len(list((tmp_path / "checkpoints" / f"{step:08d}").iterdir())) == 5
    assert store.newest() == 4
    assert not hidden_files(tmp_path)


def test_a_rank_that_saves_a_step_again_touches_nothing(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2, num_replicas=2, first=False)
    times = []
    for value in (1, 2):
        store.save(1, None, {1: {"seen": torch.full((10,), value)}})
        store.wait()
        times.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("replica-*")})
    assert len(times[0]) == 2
    assert times[0] == times[1], "the first rank may be reading it"


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    save_as_the_second_rank(tmp_path, [1])
    store = Checkpoints(tmp_path, keep=2, num_replicas=4)
    store.save(1, state_of(1), {0: {}})
    with pytest.raises(UserError, match=r"\.00000001\.part/replica-00003\.pt: expected .* within 0\.2 s"):
        store.wait()
    assert not hidden_files(tmp_path)
    assert store.newest() is None


# kills


def die_at(run: Path, number: int) -> None:
    """Save step 2, but die before the n-th time that a file or folder is opened, made, renamed or removed."""
    store, count = one_rank(run, keep=1), 0

    def hook(event: str, _: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count += 1
            if count == number:
                os._exit(9)

    sys.addaudithook(hook)
    store.save(2, state_of(2), {0: {"seen": torch.full((10,), 2)}})
    store.wait()
    os._exit(0)


@pytest.mark.thorough
@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_before_every_change_of_the_folder_leaves_a_whole_set(tmp_path: Path, damaged: bool) -> None:
    save(one_rank(tmp_path / "start"), 1, *([2] if damaged else []))
    if damaged:
        flip_a_bit(tmp_path / "start" / "checkpoints" / "00000002" / "state.pt")
    number, newest = 0, []
    while True:
        number += 1
        run = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "start", run)
        process = processes.Process(target=die_at, args=(run, number))
        process.start()
        process.join()
        store = one_rank(run, keep=1)
        newest.append(store.newest())
        if not damaged:
            assert_all_whole(store)
        assert_holds(store, newest[-1])
        store.tidy()
        assert not hidden_files(run)
        save(store, 3)
        assert store.newest() == 3
        assert store.steps == [3]
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
    assert newest == sorted(newest), "once there, step 2 stays"
    assert (newest[0], newest[-1]) == (1, 2)
    assert number > 15
