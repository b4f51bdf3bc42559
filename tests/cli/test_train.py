"""Training end to end on the tiny preset: what a run leaves behind, resumes, refuses, and survives."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlv2v.checkpoint.export import load_translator
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.files import lock_folder
from rlv2v.flags import resolve
from rlv2v.model import Translator
from rlv2v.runtime.log import RunLog, read_metrics
from rlv2v.train import train


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


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint after each; tests that change it work on a copy."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    train(tiny(data, run, snapshot_seconds=0.0))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_logs_what_it_does_and_translates_both_ways(data: Path, trained: Path) -> None:
    run = trained
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 4]
    names = {"loss", "loss_d", "g_y", "v_x", "tau_x", "rc_y", "cycle_x", "patches_y", "smoothness_x", "ramp"}
    assert names <= {name for line in lines for name in line}
    assert Config.from_json((run / "config.json").read_text(), "config") == tiny(
        data, run, replicas=1, snapshot_seconds=0.0
    )
    for direction in ("x2y", "y2x"):
        g, config = load_translator(run, direction)
        assert g(torch.zeros(1, 2, 3, 16, 16))[0].shape == (1, 2, 3, 16, 16)
        assert config.data.frames == 4


def test_tf32_is_one_switch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # and back afterwards
    train(tiny(data, tmp_path / "run", steps=1, tf32=False))
    assert not torch.backends.cudnn.allow_tf32


def test_the_best_model_is_kept_beside_the_newest(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(data, run, steps=7, snapshot_seconds=0.0, lr=0.05))  # too fast to get better all the time
    store = store_of(run)
    best = store.best
    assert best is not None and store.steps == [*({best[0]} - {6, 7}), 6, 7], "the newest two and the best"
    for step, name in ((best[0], "best"), (7, "model")):
        g, _ = load_translator(run, newest=name == "model")
        average = store.load(step)["average"]
        assert all(torch.equal(value, average[f"g_y.{key}"]) for key, value in g.state_dict().items()), name


def test_the_best_is_that_of_the_criterion_whatever_the_truth_says(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scores = tmp_path / "run", iter([3.0, 1.0, 2.0, 2.5, 2.5, 1.5, 1.5])  # the last checkpoint is measured twice
    monkeypatch.setattr("rlv2v.metrics.selection.criterion", lambda own, identity: next(scores))
    train(tiny(data, run, steps=3, snapshot_seconds=0.0, lr=0.1))
    best = (run / "best.safetensors").read_bytes()
    by_truth = min(read_metrics(run / "selection.jsonl"), key=lambda line: line["truth"]["l1"])  # type: ignore[index]
    assert store_of(run).best == (1, 1.0) and by_truth["step"] != 1
    train(tiny(data, run, steps=4, snapshot_seconds=0.0, lr=0.1, resume=True))
    assert store_of(run).best == (1, 1.0) and (run / "best.safetensors").read_bytes() == best
    g, _ = load_translator(run)
    average = store_of(run).load(1)["average"]
    assert all(torch.equal(value, average[f"g_y.{key}"]) for key, value in g.state_dict().items())
    assert [line["step"] for line in read_metrics(run / "selection.jsonl")] == [0, 1, 2, 3, 4]


def test_patience_ends_a_run_that_may_go_on(data: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "run"  # nothing changes in it, so that no checkpoint is better than the first
    still = ("--steps", 6, "--snapshot-seconds", 0, "--lr", 1e-12, "--mask-prior", 0)
    code, _, err = command("train", "--preset", "tiny", "--data", data, "--out", run, *still, "--patience", 2)
    assert code == 0 and newest(run).name == "00000002"
    assert err.splitlines()[-1].startswith("stopped by --patience 2 at step 2: the best checkpoint is that of step 0,")
    assert err.splitlines()[-1].endswith(f"; to train on: --resume --patience 4 --out {run}")
    code, _, err = command("train", "--resume", "--out", run)
    assert code == 0 and "stopped by --patience 2 at step 2" in err and newest(run).name == "00000002"
    assert command("train", "--resume", "--out", run, "--patience", 4)[0] == 0 and newest(run).name == "00000004"
    code, _, err = command("train", "--resume", "--out", run, "--patience", 0)
    assert code == 0 and "stopped" not in err and newest(run).name == "00000006"


def test_same_seed_same_run_other_seed_other_run(data: Path, trained: Path, tmp_path: Path) -> None:
    train(tiny(data, tmp_path / "again"))
    train(tiny(data, tmp_path / "other", seed=1))
    first, again, other = (weights_of(run) for run in (trained, tmp_path / "again", tmp_path / "other"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"average": 0.0, "patches": 0.0, "smoothness": 0.0, "cycle": 0.0, "identity": 0.0},
        {"head": "mask", "contrast": 1.0},
        *(
            pytest.param(changes, marks=pytest.mark.thorough)
            for changes in (
                {"rl": False},
                {"reward": "paper", "rl_every": 1},
                {"l_v": 0.0, "l_tau": 0.0, "l_rc": 0.0},
                {"gan": "nonsaturating", "disc_norm": "batch", "norm": "batch", "chrono": True},
                {"augment": "dihedral", "disc_frames": 0},
            )
        ),
    ],
)
def test_every_switch_trains(data: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    train(tiny(data, tmp_path / "run", **changes))
    g, config = load_translator(tmp_path / "run")
    if isinstance(g, Translator):
        assert config.loss.term("mask_prior") or g.mask_gain == 0, "without a prior nothing is copied"


def test_the_paper_preset_trains(data: Path, tmp_path: Path) -> None:
    small = {"size": 16, "frames": 4, "steps": 3, "warmup_steps": 2, "disc_widths": (4, 8, 8)}
    train(Config.of("paper", data=data, out=tmp_path / "run", **small))
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    additions = ("cycle", "identity", "contrast", "mask", "patches")
    assert not [name for name in last if name.startswith(additions)]
    assert {"g_x", "g_y", "v_x", "v_y", "tau_x", "tau_y", "rc_x", "rc_y", "actor_x", "loss_q_x"} <= last.keys()


def test_sets_z_and_s_may_be_missing(data: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name, to in (("trainX", "trainA"), ("trainY", "trainB")):
        (few / to).symlink_to(data / name)
    train(tiny(few, tmp_path / "run"))
    assert "identity_s" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_flags_go_on_top_of_preset_and_method() -> None:
    assert resolve({"preset": "tiny", "budget": 9.0}).steps is None
    assert resolve({"preset": "paper", "method": "cyclegan"}).optim.lr == 2e-4
    config = resolve({"preset": "tiny", "data": {"size": 24}, "loss": {"cycle": 1.5}})
    assert (config.data.size.plain, config.data.frames, config.loss.term("cycle"), config.steps) == (24, 4, 1.5, 4)
    assert Config().length == ("s", 300.0)


@pytest.mark.parametrize("preset", ["default", "paper", "tiny", "laptop", "workstation", "gpu24", "gpu80"])
def test_a_config_survives_its_file(preset: str) -> None:
    config = Config.of(preset, data=Path("mine"), seed=3).check()
    assert Config.from_json(config.to_json(), "config") == config


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda values: values["model"].pop("widths"), "one without 'widths'"),
        (lambda values: values.pop("loss"), "one without 'loss'"),
        (lambda values: values["data"].update(odd=1), "a setting more than it has"),
        (lambda values: values.update(data="folder"), "one without 'the sections of settings'"),
        (lambda values: values["data"].update(frames="big"), "not supported"),
    ],
)
def test_a_config_of_another_version_is_refused(change: Callable[[dict[str, Any]], object], got: str) -> None:
    values = json.loads(Config().to_json())
    change(values)
    with pytest.raises(UserError, match=rf"old: expected a config of this version of rlv2v, got .*{got}"):
        Config.from_json(json.dumps(values), "old")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--size 20", "--size: expected a multiple of 8 (patch * 2 ** number of widths): 16 or 24, got 20"),
        ("--frames 1", "--frames: expected at least 2, got 1"),
        ("--lr 0", "--lr: expected a number > 0, got 0.0"),
        ("--cycle nan", "--cycle: expected a number >= 0, got nan"),
        ("--steps 4 --budget 3", "--steps: expected --steps or --budget, not both, got 4"),
        ("--gamma 1.5", "--gamma: expected 0 <= value < 1, got 1.5"),
        ("--betas 0.5 1", "--betas: expected two numbers >= 0 and < 1, got (0.5, 1.0)"),
        ("--eta1 0.5 2", "--eta1: expected two probabilities, got (0.5, 2.0)"),
        ("--loader-threads 0", "--loader-threads: expected at least 1, got 0"),
        ("--head convlstm", "--patch: expected 1 with --head convlstm, got 2"),
        ("--device cpu --decode gpu", "--decode gpu: expected to train on a CUDA device, got cpu; use --decode cpu"),
    ],
)
def test_bad_values(data: Path, tmp_path: Path, flags: str, line: str, command: Command) -> None:
    arguments = ("train", "--preset", "tiny", "--data", data, "--out", tmp_path / "run", *flags.split())
    assert refusal(command(*arguments)) == f"rlv2v.train: {line}"
    assert not (tmp_path / "run").exists()


def test_bad_data(data: Path, tmp_path: Path, command: Command) -> None:
    def refused(*arguments: object) -> str:
        return refusal(command("train", "--preset", "tiny", "--out", tmp_path / "run", "--data", *arguments))

    assert "nowhere" in refused(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    (empty / "trainX").mkdir(parents=True)
    assert "trainX" in refused(empty)
    (empty / "trainX" / "a.mp4").write_bytes(b"no video")
    assert "a.mp4" in refused(empty)
    (empty / "trainX" / "good.mp4").symlink_to(next((data / "trainX").iterdir()).resolve())
    assert "trainY" in refused(empty)
    assert "shorter" in refused(data, "--frames", 64)
    assert "tpu9" in refused(data, "--device", "tpu9")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_and_may_be_made_longer(
    data: Path, tmp_path: Path, run: Path, command: Command
) -> None:
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    (tmp_path / "file").write_text("")
    for arguments, word in (
        (("--preset", "tiny", "--data", data, "--out", run), "--resume"),
        (("--resume", "--out", run, "--lr", 0.1), "--lr"),
        (("--resume", "--out", tmp_path / "no-run"), "no-run"),
        (("--preset", "tiny", "--data", data, "--out", tmp_path / "file"), "file"),
    ):
        assert word in refusal(command("train", *arguments))
    assert files == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with lock_folder(run):
        assert "another run is at work" in refusal(command("train", "--resume", "--out", run, "--steps", 6))
    assert command("train", "--resume", "--out", run, "--steps", 6)[0] == 0
    assert newest(run).name == "00000006"


def test_a_changed_dataset_is_refused_by_the_names_of_its_files(data: Path, tmp_path: Path, command: Command) -> None:
    mine, run = shutil.copytree(data, tmp_path / "mine"), tmp_path / "run"
    train(tiny(mine, run, steps=1))
    clips = sorted((mine / "trainX").glob("*.mp4"))
    clips[0].rename(mine / "trainX" / "other.mp4")
    clips[1].write_bytes(clips[2].read_bytes())
    line = refusal(command("train", "--resume", "--out", run, "--steps", 2))
    names = f"trainX/{clips[1].name} changed; trainX/other.mp4 appeared; trainX/{clips[0].name} vanished"
    assert line == (
        f"rlv2v.train: resume: {mine} must stay as it was: {names}; restore it, or start a new run by --from"
    )


def test_a_run_starts_from_an_earlier_ones_weights(data: Path, trained: Path, tmp_path: Path, command: Command) -> None:
    few, out = tmp_path / "few", tmp_path / "new"
    for name in ("trainX", "trainY"):
        (few / name).mkdir(parents=True)
        for clip in sorted((data / name).glob("*.mp4"))[:4]:
            (few / name / clip.name).symlink_to(clip)
    flags = ("--data", few, "--lr", 1e-9, "--disc-lr", 1e-9, "--seed", 5, "--steps", 1, "--warmup-steps", 9)
    code, _, err = command("train", "--from", trained, "--out", out, *flags)
    assert code == 0, err
    assert f"started from {trained} at its step 4: weights and moments are taken over; steps, schedule, replay" in err
    first, before = store_of(out).load(0), store_of(trained).load(4)
    for part in ("nets", "targets", "average"):
        assert all(torch.equal(first[part][key], value) for key, value in before[part].items()), part
    for part in ("adam_generators", "adam_discriminators", "adam_critic_x"):
        moments = zip(first[part]["state"].items(), before[part]["state"].items(), strict=True)
        assert all(torch.equal(a["exp_avg"], b["exp_avg"]) and a["step"] == b["step"] for (_, a), (_, b) in moments)
    assert first["adam_generators"]["param_groups"][0]["lr"] == 1e-9
    assert first["schedule"]["step"] == 0 and store_of(out).steps == [0, 1]
    assert first["schedule"]["first"] == before["schedule"]["first"] > 0, "how far the domains were apart"
    config = Config.read(out / "config.json")
    assert (config.from_run, config.data.size.plain, config.data.folder, config.seed) == (trained, 16, few, 5)
    code, _, err = command("train", "--resume", "--out", out, "--steps", 2)
    assert code == 0 and "started from" not in err and store_of(out).steps[-1] == 2


def test_what_no_run_can_start_from_is_refused_in_one_line(
    data: Path, trained: Path, tmp_path: Path, command: Command
) -> None:
    tiny_flags = ("--preset", "tiny", "--data", data)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((trained / "config.json").read_text())
    for flags, message in (
        ((*tiny_flags, "--widths", 4, 4), r"--widths: the run of --from has \(4, 8\), got \(4, 4\), to which its weig"),
        ((*tiny_flags, "--head", "mask"), "--head: the run of --from has 'grid', got 'mask'"),
        (("--method", "colour-map", "--data", data), "--method: the run of --from has 'rlv2v', got 'colour-map'"),
    ):
        line = refusal(command("train", "--from", trained, "--out", tmp_path / "new", *flags))
        assert re.search(message, line), line
    line = refusal(command("train", "--from", tmp_path / "none", "--out", tmp_path / "new"))
    assert "none/config.json: expected the config of a run, found no file" in line
    line = refusal(command("train", "--from", tmp_path / "empty", "--out", tmp_path / "new"))
    assert "expected a run with a checkpoint, found none" in line
    assert not (tmp_path / "new").exists()
    maps = tmp_path / "maps"
    assert command("train", "--method", "colour-map", *tiny_flags, "--steps", 2, "--out", maps)[0] == 0
    line = refusal(command("train", "--from", maps, "--out", tmp_path / "new"))
    assert "--method colour-map is fitted to its clips anew; leave out --from" in line


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["cyclegan", "recycle-gan"])
def test_a_baseline_starts_from_its_own_weights_with_an_average_that_it_had_not(
    data: Path, tmp_path: Path, method: str, command: Command
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    small = ("--size", 16, "--frames", 4, "--widths", 4, "--disc-widths", 4)
    assert command("train", "--method", method, "--data", data, "--out", first, "--steps", 1, *small)[0] == 0
    code, _, err = command("train", "--from", first, "--out", second, "--average", 0.5, "--lr", 1e-9)
    assert code == 0, err
    before, now = store_of(first).load(1)["nets"], store_of(second).load(0)
    assert all(torch.equal(value, before[name]) for part in ("nets", "average") for name, value in now[part].items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def test_a_damaged_checkpoint_is_passed_over(data: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`tests/checkpoint` damages every file in every way."""
    expected = weights_of(run)
    cut(newest(run) / "state.pt")
    train(tiny(data, run, resume=True))
    assert "state.pt" in caplog.text and "step 3 is used instead" in caplog.text
    assert all(torch.equal(value, expected[key]) for key, value in weights_of(run).items()), "and step 4 is made again"


def test_a_model_of_another_version_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with safe_open(tiny_run / "model.safetensors", framework="pt") as file:
        metadata = file.metadata() | {"version": "1"}
    save_file(load_file(tiny_run / "model.safetensors"), tmp_path / "model.safetensors", metadata)
    with pytest.raises(UserError, match=r"version 1 instead of .*train anew"):
        load_translator(tmp_path)


def test_a_run_without_a_whole_checkpoint_or_model_is_refused(run: Path, tmp_path: Path, command: Command) -> None:
    for path in (run / "checkpoints").glob("*/state.pt"):
        cut(path)
    assert "state.pt" in refusal(command("train", "--resume", "--out", run, "--steps", 9))
    model = run / "model.safetensors"
    for content in (model.read_bytes()[:200], b"", b"{}", pickle.dumps({"g": 1}, protocol=2)):
        model.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_translator(run, newest=True)
    with pytest.raises(UserError, match="train one first"):
        load_translator(tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_the_run_goes_on(
    data: Path, tmp_path: Path, name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, write = tmp_path / "run", RunLog.write

    def write_and_interrupt(log: RunLog, step: int, *rest: Any) -> None:
        write(log, step, *rest)
        if step == 1:
            with pytest.raises(UserError, match=f"another run is at work .*pid {os.getpid()}"):
                lock_folder(run)
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(RunLog, "write", write_and_interrupt)
    code, _, err = command("train", "--preset", "tiny", "--data", data, "--out", run, "--steps", 1000)
    assert code == 0
    assert err.splitlines()[-1] == f"stopped by {name} at step 2; go on with --resume --out {run}"
    assert newest(run).name == "00000002"
    assert command("train", "--resume", "--out", run, "--steps", 3)[0] == 0
    assert newest(run).name == "00000003"


def test_without_data_the_synthetic_set_is_written_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(Config.of("tiny", out=Path("run"), steps=1))
    assert (tmp_path / "data" / "synth-16x4" / "dataset.json").is_file()
    assert Config.from_json(Path("run/config.json").read_text(), "config").data.folder == Path("data/synth-16x4")
