"""Training end to end on the tiny preset: what a run leaves behind, resumes, refuses, and survives."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlv2v.checkpoint.export import load_translator
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.cli import run_command
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError
from rlv2v.flags import flags_type, resolve
from rlv2v.presets import PRESETS
from rlv2v.runtime.log import read_metrics
from rlv2v.train import main, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=2))
    return out


def tiny(data: Path, out: Path, **changes: object) -> Config:
    return Config.of("tiny", data=data, out=out, **changes)


def store_of(run: Path) -> Checkpoints:
    return Checkpoints(run, keep=1, num_replicas=1)


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    return run / "checkpoints" / f"{store_of(run).steps[-1]:08d}"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    state = store_of(run).load(store_of(run).steps[-1])
    return {f"{part}.{key}": value for part in ("nets", "targets", "average") for key, value in state[part].items()}


def assert_same(a: Path, b: Path) -> None:
    mine, theirs = weights_of(a), weights_of(b)
    assert mine.keys() == theirs.keys()
    different = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert not different, different[:3]


def command(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What `python -m rlv2v.train ARGUMENTS` does, in this process."""
    monkeypatch.setattr(sys, "argv", ["rlv2v.train", *map(str, arguments)])
    run_command(main, flags_type())


def refused(arguments: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(arguments, monkeypatch)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pytest")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_leaves_what_the_other_commands_read(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    train(tiny(data, run))
    assert {"config.json", "metrics.jsonl", "model.safetensors", "checkpoints", "samples", "tensorboard"} <= {
        p.name for p in run.iterdir()
    }
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 4]
    names = {"loss", "loss_d", "loss_q", "g_y", "v_x", "tau_x", "rc_y", "cycle_x", "contrast_y", "colours_y", "gap"}
    assert names <= {name for line in lines for name in line}
    assert list((run / "samples").glob("*.png"))
    assert Config.from_json((run / "config.json").read_text(), "config") == tiny(data, run, replicas=1)
    for direction in ("x2y", "y2x"):
        g, config = load_translator(run, direction)
        assert g(torch.zeros(1, 2, 3, 16, 16))[0].shape == (1, 2, 3, 16, 16)
        assert config.data.frames == 4


def test_the_best_model_is_kept_beside_the_newest(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data, run, steps=12, snapshot_seconds=0.0, lr=0.05))  # too fast to get better all the time
    store = store_of(run)
    best = store.best
    assert best is not None and store.steps == [*({best[0]} - {11, 12}), 11, 12], "the newest two and the best"
    for step, name in ((best[0], "best"), (12, "model")):
        g, _ = load_translator(run, best=name == "best")
        average = store.load(step)["average"]
        assert all(torch.equal(value, average[f"g_y.{key}"]) for key, value in g.state_dict().items()), name


def test_same_seed_same_run_other_seed_other_run(data: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny(data, tmp_path / name, seed=seed))
    assert_same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a", tmp_path / "c")


def without_times(line: dict[str, float]) -> dict[str, float]:
    times = ("seconds", "frames_per_second")
    return {name: value for name, value in line.items() if name not in times and not name.startswith("time_")}


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_resumed_run_is_the_uninterrupted_run(data: Path, tmp_path: Path, alpha: float) -> None:
    config = tiny(data, tmp_path / "whole", steps=9, snapshot_seconds=0.0, replay_alpha=alpha, rl_every=1)
    train(config)
    before = weights_of(tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(newest(tmp_path / "whole"))  # as if killed right after step 8's checkpoint
    train(config.replace(resume=True, loader_threads=3))
    after = weights_of(tmp_path / "whole")
    assert all(torch.equal(before[key], after[key]) for key in before)
    resumed = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for old, new in zip(map(json.loads, lines), resumed, strict=True):
        assert without_times(old) == without_times(new)


def test_resume_may_make_a_run_longer(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny(data, tmp_path / "run"))
    command(["--resume", "--out", tmp_path / "run", "--steps", 6], monkeypatch)
    assert newest(tmp_path / "run").name == "00000006"


@pytest.mark.parametrize(
    "changes",
    [
        {"rl": False},
        {"method": "cyclegan"},
        {"reward": "paper", "rl_every": 1},
        {"average": 0.0, "colours": 0.0, "contrast": 0.0, "mask_prior": 0.0, "cycle": 0.0, "identity": 0.0},
        {"l_v": 0.0, "l_tau": 0.0, "l_rc": 0.0},
        {"gan": "nonsaturating", "disc_norm": "clip", "chrono": False},
        {"augment": "dihedral", "disc_frames": 0, "threads": 2},
    ],
)
def test_every_switch_trains(data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    method = str(changes.pop("method", "rlv2v"))
    train(Config.of("tiny", method, data=data, out=tmp_path / "run", **changes))
    g, config = load_translator(tmp_path / "run")
    assert config.per_frame == (method == "cyclegan")
    assert config.loss.term("mask_prior") or g.mask_gain == 0, "without a prior nothing is copied"


def test_the_paper_preset_trains(data: Path, tmp_path: Path) -> None:
    small = {"size": 16, "frames": 4, "steps": 3, "warmup_steps": 2, "disc_widths": (4, 8, 8)}
    train(Config.of("paper", data=data, out=tmp_path / "run", **small))
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    additions = ("cycle", "identity", "contrast", "mask", "colours")
    assert not [name for name in last if name.startswith(additions)]
    assert {"g_x", "g_y", "v_x", "v_y", "tau_x", "tau_y", "rc_x", "rc_y", "actor", "loss_q"} <= last.keys()


def test_sets_z_and_s_may_be_missing(data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name, to in (("trainX", "trainA"), ("trainY", "trainB")):
        (few / to).symlink_to(data / name)
    train(tiny(few, tmp_path / "run"))
    assert "identity_s" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_presets_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in PRESETS.items():
        config = Config.of(name)
        assert all(config.get(key) == value for key, value in changes.items())
    assert resolve({"preset": "tiny", "budget": 9.0}).steps is None
    assert resolve({"preset": "paper", "method": "cyclegan"}).loss.l_v == 0.0
    assert resolve({"preset": "tiny", "data": {"size": 24}}).data.size == 24
    assert Config().length == ("s", 300.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--size", "20"], "--size"),
        (["--frames", "1"], "--frames"),
        (["--lr", "0"], "--lr"),
        (["--steps", "4", "--budget", "3"], "--steps"),
        (["--gamma", "1.5"], "--gamma"),
        (["--device", "tpu9"], "--device"),
        (["--eta1", "0.5", "2"], "--eta1"),
        (["--loader-threads", "0"], "--loader-threads"),
        (["--device", "cpu", "--decode", "gpu"], "--decode gpu: expected to train on a CUDA device, got cpu"),
        (["--preset", "nonsense"], "--preset"),
        (["--gamma", "much"], "--gamma"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_bad_values(
    data: Path,
    tmp_path: Path,
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--preset", "tiny", "--data", data, "--out", tmp_path / "run", *flags]
    assert says in refused(arguments, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_bad_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start: list[object] = ["--preset", "tiny", "--out", tmp_path / "run", "--data"]
    assert "nowhere" in refused([*start, tmp_path / "nowhere"], monkeypatch, capsys)
    empty = tmp_path / "empty"
    (empty / "trainX").mkdir(parents=True)
    assert "trainX" in refused([*start, empty], monkeypatch, capsys)
    (empty / "trainX" / "a.mp4").write_bytes(b"no video")
    assert "a.mp4" in refused([*start, empty], monkeypatch, capsys)
    (empty / "trainX" / "good.mp4").symlink_to(next((data / "trainX").iterdir()).resolve())
    assert "trainY" in refused([*start, empty], monkeypatch, capsys)
    assert "shorter" in refused([*start, data, "--frames", 64], monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(data, run))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "--resume" in refused(["--preset", "tiny", "--data", data, "--out", run], monkeypatch, capsys)
    assert "--lr" in refused(["--resume", "--out", run, "--lr", 0.1], monkeypatch, capsys)
    assert "no-run" in refused(["--resume", "--out", tmp_path / "no-run"], monkeypatch, capsys)
    (tmp_path / "file").write_text("")
    assert "file" in refused(["--preset", "tiny", "--data", data, "--out", tmp_path / "file"], monkeypatch, capsys)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def damage(path: Path, kind: str) -> None:
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "foreign":
        path.write_bytes(b"hello")
    elif kind == "malicious":
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    else:
        torch.save({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("kind", ["truncated", "foreign", "malicious", "other"])
@pytest.mark.parametrize("name", ["state.pt", "replica-00000.pt"])
def test_a_damaged_checkpoint_is_passed_over(
    data: Path, tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    train(tiny(data, run, snapshot_seconds=0.0))
    whole = weights_of(run)
    monkeypatch.chdir(tmp_path)
    damage(newest(run) / name, kind)
    train(tiny(data, run).replace(resume=True))
    assert name in caplog.text and "step 3 is used instead" in caplog.text
    assert all(torch.equal(value, whole[key]) for key, value in weights_of(run).items()), "and step 4 is made again"
    assert not (tmp_path / "pwned").exists()


def test_no_whole_checkpoint_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny(data, run))
    for path in (run / "checkpoints").glob("*/state.pt"):
        damage(path, "truncated")
    assert "state.pt" in refused(["--resume", "--out", run, "--steps", 9], monkeypatch, capsys)


def test_bad_models(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data, run))
    model = run / "model.safetensors"
    whole = model.read_bytes()
    for damage in (whole[:200], b"", b"{}", pickle.dumps(Malicious(), protocol=2)):
        model.write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_translator(run)
    with pytest.raises(UserError, match="train one first"):
        load_translator(tmp_path)


def start(arguments: list[object], **how: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "rlv2v.train", *map(str, arguments)]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload, no-any-return]


def test_ctrl_c_saves_and_the_run_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    process = start(["--preset", "tiny", "--data", data, "--out", run, "--steps", 100000])
    deadline = time.monotonic() + 60
    while not read_metrics(run / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume" in err.splitlines()[-1]
    step = int(newest(run).name)
    command(["--resume", "--out", run, "--steps", step + 1], monkeypatch)
    assert int(newest(run).name) == step + 1


def test_a_full_disk_is_said_and_leaves_nothing_half_written(data: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(["--preset", "tiny", "--data", data, "--out", tmp_path / "run"], preexec_fn=small_files)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    assert not list((tmp_path / "run").rglob(".*.p*"))
    assert not store_of(tmp_path / "run").steps


def test_without_data_the_synthetic_set_is_written_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(Config.of("tiny", out=Path("run"), steps=1))
    assert (tmp_path / "data" / "synth-16x4" / "dataset.json").is_file()
    assert Config.from_json(Path("run/config.json").read_text(), "config").data == Path("data/synth-16x4")
