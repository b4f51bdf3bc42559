"""Tests of checkpoints: what is saved comes back, and only whole ones are used."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import assert_holds, flip_a_bit, hidden_files, one_rank, save, state_of

from rlv2v.checkpoint.state_files import Copier
from rlv2v.errors import UserError


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = {"rng": torch.get_rng_state(), 3: "x", "big": 2**100, "groups": [{"betas": (0.5, 0.9)}], "none": None}
    store = one_rank(tmp_path / "run")
    assert store.newest() is None
    store.save(7, state, {0: {"seen": torch.arange(3)}})
    store.wait()
    assert store.newest() == 7
    assert store.steps == [7]
    assert store.replicas(7) == 1
    loaded = store.load(7)
    assert torch.equal(loaded.pop("rng"), state.pop("rng"))
    assert loaded == state
    assert store.load(7, "replica-00000")["seen"].tolist() == [0, 1, 2]
    folder = tmp_path / "run" / "checkpoints" / "00000007"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "replica-00000.pt", "state.pt"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["state.pt"] == described((folder / "state.pt").read_bytes())
    assert not hidden_files(tmp_path)


def test_training_in_place_does_not_reach_what_is_saved(tmp_path: Path) -> None:
    store, weights = one_rank(tmp_path), torch.zeros(1_000_000)
    nested: dict[str, Any] = {"w": weights, "groups": [{"lr": 1.0}]}
    for step in (1, 2, 3):
        weights.fill_(step)
        nested["groups"][0]["lr"] = float(step)
        store.save(step, {"nested": nested}, {0: {"replay": torch.ones(1)}})
        weights.fill_(-1.0)
        nested["groups"][0]["lr"] = -1.0
    store.wait()
    for step in (1, 2, 3):
        state = store.load(step)["nested"]
        assert bool((state["w"] == step).all())
        assert state["groups"] == [{"lr": float(step)}]


def test_the_memory_of_the_last_copy_is_reused_and_taken_tensors_are_not_copied() -> None:
    copier, value = Copier(), torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
    first = copier.copy("state", {"a": {"w": value}})["a"]["w"]
    assert torch.equal(first, value)
    assert first.stride() == value.stride()
    assert first.data_ptr() != value.data_ptr()
    value += 1
    second = copier.copy("state", {"a": {"w": value}})["a"]["w"]
    assert torch.equal(second, value)
    assert second.data_ptr() == first.data_ptr()
    assert copier.copy("state", {"a": {"w": torch.zeros(9)}})["a"]["w"].shape == (9,)
    assert copier.copy("replica", {"w": value}, taken=True)["w"].data_ptr() == value.data_ptr()


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(3), {1}, object(), {(1, 2): 3}])
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(tmp_path: Path, value: object) -> None:
    store = one_rank(tmp_path)
    with pytest.raises(ValueError, match="state/outer"):
        store.save(1, {"outer": [value]}, {0: {}})
    store.wait()
    assert store.newest() is None


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="first rank"):
        one_rank(tmp_path).save(1, None, {0: {}})
    with pytest.raises(ValueError, match=r"0\.\.0, got \[1\]"):
        one_rank(tmp_path).save(1, {}, {1: {}})
    with pytest.raises(ValueError, match="metric must be finite, got nan"):
        one_rank(tmp_path).save(1, {}, {0: {}}, metric=float("nan"))


def test_the_newest_and_the_best_are_kept_over_restarts(tmp_path: Path) -> None:
    metrics = {1: 5.0, 2: 1.0, 3: 4.0, 4: 1.0, 5: None, 6: 3.0}
    for step, metric in metrics.items():
        store = one_rank(tmp_path, keep=2)  # each as after a restart
        save(store, step, metric=metric)
        assert store.steps[-1] == step
    assert store.steps == [2, 5, 6]
    assert store.best == (2, 1.0)
    save(store, 7, metric=0.5)
    assert one_rank(tmp_path).best == (7, 0.5)
    assert store.steps == [6, 7]
    assert not hidden_files(tmp_path)


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    store = one_rank(tmp_path)
    save(store, 1)
    folder = tmp_path / "checkpoints" / "00000001"
    before = {path: path.stat().st_ino for path in (folder, *folder.iterdir())}
    store.save(1, state_of(9), {0: {}})
    store.wait()
    after_restart = one_rank(tmp_path)
    after_restart.save(1, state_of(9), {0: {}})
    after_restart.wait()
    assert before == {path: path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert_holds(store, 1)
    assert not hidden_files(tmp_path)


def changed(**changes: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FILES = ["state.pt", "replica-00000.pt", "manifest.json"]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "a bit": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "foreign": lambda path: path.write_bytes(b"[" * 100_000 if path.suffix == ".json" else b"hello"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "gone": Path.unlink,
}
MANIFESTS: dict[str, Callable[[Path], object]] = {
    "version": changed(version=1),
    "step": changed(step=1),
    "replicas": changed(num_replicas=2),
    "many replicas": changed(num_replicas=10**12),
    "metric": changed(metric="0.1"),
    "no files": changed(files=[]),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [*((name, damage) for name in FILES for damage in DAMAGES), *(("manifest.json", damage) for damage in MANIFESTS)],
)
def test_a_damaged_checkpoint_is_passed_over_by_name(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = one_rank(tmp_path)
    save(store, 1, 2, metric=0.5)
    (DAMAGES | MANIFESTS)[damage](tmp_path / "checkpoints" / "00000002" / name)
    with caplog.at_level(logging.WARNING):
        assert store.newest() == 1
    [record] = caplog.records
    assert f"00000002/{name}: expected" in record.getMessage()
    assert record.getMessage().endswith("step 1 is used instead")
    assert damage != "truncated" or name == "manifest.json" or " bytes, got " in record.getMessage()
    assert store.best == (1, 0.5)
    assert_holds(store, 1)
    with pytest.raises(UserError, match=name):
        store.load(2, Path(name).stem if name.endswith("pt") else "state")
    shutil.rmtree(tmp_path / "checkpoints" / "00000001")
    with pytest.raises(UserError, match=f"no whole checkpoint .*00000002/{name}"):
        store.newest()
    save(one_rank(tmp_path), 2)  # the run has come there again
    assert store.newest() == 2
    assert_holds(store, 2)
    assert not hidden_files(tmp_path)


def test_a_damaged_later_checkpoint_costs_no_whole_one_its_place(tmp_path: Path) -> None:
    save(one_rank(tmp_path), 1, 5, 6)
    for step in (5, 6):
        flip_a_bit(tmp_path / "checkpoints" / f"{step:08d}" / "state.pt")
    store = one_rank(tmp_path, keep=2)
    save(store, 3)
    assert store.newest() == 3
    save(store, 4)
    assert store.newest() == 4
    assert store.steps == [3, 4, 5, 6]


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the order of flushes and of the rename that makes it count: a kill does not show it, a power cut would."""
    done: list[str] = []

    def name(path: object) -> str:
        return str(Path(str(path)).relative_to(tmp_path))

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        real(descriptor)
        done.append(name(os.readlink(f"/proc/self/fd/{descriptor}")))

    def rename(old: Path, new: Path, real: Callable[[Path, Path], None] = os.rename) -> None:
        real(old, new)
        done.append(f"{name(old)} is {name(new)}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(one_rank(tmp_path), 1)
    part = "checkpoints/.00000001.part"
    assert done == [
        f"{part}/state.pt",
        f"{part}/replica-00000.pt",
        f"{part}/.partial-{os.getpid()}-manifest.json",
        part,
        f"{part} is checkpoints/00000001",
        "checkpoints",
        ".",
    ]


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def forge(folder: Path, name: str, data: bytes) -> None:
    """Put a file in a checkpoint with a manifest that vouches for it."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = described(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["pickle", "torch", "no dict", "nothing"])
def test_no_code_of_a_checkpoint_runs(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = one_rank(tmp_path)
    save(store, 1)
    data = {"pickle": pickle.dumps(Malicious(), protocol=2), "nothing": b""}.get(kind)
    if data is None:
        torch.save(Malicious() if kind == "torch" else torch.zeros(2), tmp_path / "file")
        data = (tmp_path / "file").read_bytes()
    forge(tmp_path / "checkpoints" / "00000001", "state.pt", data)
    with pytest.raises(UserError, match=r"00000001/state\.pt: expected a state written by rlv2v"):
        store.load(1)
    assert not (tmp_path / "pwned").exists()


def test_names_outside_the_checkpoint_are_refused(tmp_path: Path) -> None:
    save(one_rank(tmp_path), 1)
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"expected one of replica-00000\.pt, state\.pt"):
        one_rank(tmp_path).load(1, "../../other")


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    store = one_rank(tmp_path, keep=1)
    for name in ("00000009.pt", "notes", "0000000x", "9", ".hidden"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert store.newest() is None
    save(store, 1, 2)
    store.tidy()
    assert store.steps == [2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6
