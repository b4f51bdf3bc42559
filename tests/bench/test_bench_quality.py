"""bench/quality.py: its cases, few-shot subsets, and runs that an interruption neither loses nor mixes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import quality
import quality_few
import quality_runs
import tyro
from quality_cases import Case, digest, few_shot, make_case, pick_split, target_order
from quality_ladder import LADDER, SWITCHES, rung
from quality_runs import Run, Workers, rows_of_run

from rlv2v.config import Config
from rlv2v.data.index import open_dataset
from rlv2v.data.synth import Counts, clip_of, write_dataset
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError
from rlv2v.flags import flags_type, resolve
from rlv2v.method.baselines import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = Counts(x=8, y=16, z=12, s=2, val=2, test=1)  # 4 clips of Y, 3 of Z


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases") / "mine"
    write_dataset(folder, size=16, frames=4, counts=COUNTS)
    return folder


class Recorded(Workers):
    """Do no training: write what the commands would leave behind, and remember them."""

    def __init__(self, rows: dict[str, Any] | None = None) -> None:
        super().__init__(1, 1)
        self.commands = list[list[str]]()
        self.fails = ""
        self.rows = rows or {"model": {"psnr": 20.0}, "identity": {"psnr": 10.0}, "truth": {"psnr": None}}

    def python(self, *arguments: object) -> None:
        words = [str(word) for word in arguments]
        self.commands.append(words)
        if words[1] == self.fails:
            raise RuntimeError("no space left")
        if words[1] == "rlv2v.train":
            length = "--steps" if "--steps" in words else "--budget"
            folder, budget = (words[words.index(flag) + 1] for flag in ("--out", length))
            Path(folder).mkdir(exist_ok=True)
            line = {"step": int(float(budget) * 10), "seconds": float(budget) + 0.04}
            (Path(folder) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        else:
            spread = {name: dict.fromkeys(row, 0.5) for name, row in self.rows.items()}
            Path(words[words.index("--json") + 1]).write_text(json.dumps({"rows": self.rows, "spread": spread}))


def run_of(out: Path, data: Path, **row: Any) -> Run:
    known = {"case": "mine", "method": "tiny", "seed": 0, "few": None, "lr": None}
    return Run(out / "mine-tiny-0", data, ("--preset", "tiny"), known | row, (2.0,), 1, {"data": "d"})


def test_every_method_of_the_registry_is_there() -> None:
    ours = {"default", "rl", "paint", "paper", "paper-letter", "bf16", "laptop", "tiny", *LADDER}
    assert set(quality.FLAGS) == ours | set(METHODS) - {"rlv2v"}
    assert quality.FLAGS["cyclegan"][-2:] == ("--method", "cyclegan")


def test_the_ladder_leads_from_paper_to_default() -> None:
    steps = [Config.of("paper", **rung(number)).check() for number in range(len(SWITCHES))]
    assert steps[0] == Config.of("paper") and steps[-1].replace(preset="default", augment="flip") == Config()
    assert len({step.to_json() for step in steps}) == len(steps), "each switch changes something"
    for number, step in enumerate(steps):
        assert resolve(tyro.cli(flags_type(), args=LADDER[f"ladder-{number:02}"])) == step


def test_a_run_may_be_so_many_steps_long(data: Path, tmp_path: Path) -> None:
    plan = plan_of(data, tmp_path, steps=7)
    run, workers = plan.run("ladder-00", None, 0, None), Recorded()
    (row, *_) = rows_of_run(run, data, "test", workers)
    assert "--steps 7" in " ".join(workers.commands[0]) and "--budget" not in workers.commands[0]
    assert run.folder.name == "mine-7steps-ladder-00-0"
    assert (row["case"], row["budget_s"], row["steps"], row["psnr"]) == ("mine-7steps", 0.0, 70, 20.0)
    assert plan.run("ladder-00", None, 0, None).fingerprint != replace(run, unit="budget").fingerprint
    quality.Args(methods=("default", "ladder")).check()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("synth32", Case("synth32", "synth", 32, 8)),
        ("cue64", Case("cue64", "cue", 64, 8)),
        ("region48", Case("region48", "region", 48, 8)),
        ("graded64", Case("graded64", "graded", 64, 8)),
    ],
)
def test_named_cases(case: str, expected: Case) -> None:
    assert make_case(case, frames=8) == expected
    assert expected.is_synthetic == (expected.kind in ("synth", "cue"))
    assert (expected.augment == "dihedral") == (expected.kind == "synth"), "a transpose breaks the cue, and streets"
    assert expected.starts_together == (expected.kind in ("synth", "graded")), "the cue comes at any time"


def test_a_seed_has_its_own_synthetic_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[dict[str, Any]]()
    monkeypatch.setattr("quality_cases.write_dataset", lambda out, **settings: written.append({"out": out} | settings))
    case = make_case("synth16", frames=4, reading="paper")
    folders = {case.data(tmp_path, 0), case.data(tmp_path, 1), make_case("cue16", frames=4).data(tmp_path, 1)}
    assert len(folders) == 3 and case.name == "synth16-paper"
    assert [(w["seed"], w["reading"], w["switch"]) for w in written] == [
        (0, "paper", "half"),
        (1, "paper", "half"),
        (1, "ours", "crossing"),
    ]


def test_cases_that_are_none_are_named(tmp_path: Path) -> None:
    for case, flags, message in (
        ("synth", {}, "--case: expected synth<N>, .* or a dataset folder, got synth"),
        ("graded64", {"reading": "paper"}, "--reading paper: expected a synthetic case, got --case graded64"),
        ("synth32", {"stored": 64}, "--stored: expected a case of real footage, got --case synth32"),
        ("synth32", {"size": 64}, "--size: expected none, as synth32 has it in its name, got 64"),
    ):
        with pytest.raises(UserError, match=message):
            make_case(case, frames=8, **flags)
    with pytest.raises(UserError, match=r"expected a folder testX or valX with source videos, found none"):
        pick_split(tmp_path, "test")


def test_a_folder_without_a_test_set_is_measured_on_val(data: Path, tmp_path: Path) -> None:
    case = make_case(str(data), frames=4)
    assert (case.name, case.size, case.data(tmp_path, 3)) == ("mine", 64, data)
    (tmp_path / "valX").mkdir()
    assert pick_split(data, "test") == "test" and pick_split(tmp_path, "test") == "val"
    with pytest.raises(UserError, match=r"found none$"):
        pick_split(data / "trainX", "val")


def test_few_shot_subsets_are_nested_and_of_y_and_z(data: Path, tmp_path: Path) -> None:
    chosen = list[set[Path]]()
    for num in (1, 2, 5, 7):
        subset = few_shot(data, num, tmp_path)
        sets = open_dataset(subset, frames=4).sets
        chosen.append({source.path.resolve() for name in "yz" for source in sets[name]})
        assert len(chosen[-1]) == num and sets["y"] and len(sets["x"]) == 2 and len(sets["s"]) == 2
        assert {(subset / name).resolve() for name in ("testX", "testTruth")} == {data / "testX", data / "testTruth"}
    assert all(small < large for small, large in pairwise(chosen))
    assert chosen[-1] == {path for name in ("trainY", "trainZ") for path in (data / name).glob("*.mp4")}
    assert few_shot(data, 2, tmp_path) == tmp_path / "data-mine-few2", "what is there is taken as it is"
    assert len({digest(few_shot(data, num, tmp_path), 4) for num in (1, 2, 5)}) == 3
    assert target_order(data)[0].parent.name == "trainY"
    with pytest.raises(UserError, match="--few: expected 1 to 7 target clips of mine, got 8"):
        few_shot(data, 8, tmp_path)
    other = tmp_path / "other" / "mine"
    write_dataset(other, size=16, frames=4, counts=COUNTS)
    with pytest.raises(UserError, match=r"data-mine-few2: of other clips than .*other/mine has; choose another --out"):
        few_shot(other, 2, tmp_path)


def test_images_that_are_one_clip_are_taken_together(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", size=16, frames=4, counts=replace(COUNTS, y=4, z=0))
    clip, _ = clip_of("trainY", 0, seed=0, frames=4, size=16)
    (tmp_path / "set/trainY/00000.mp4").unlink()
    for index, frame in enumerate(clip):
        cv2.imwrite(str(tmp_path / f"set/trainY/{index}.png"), frame[..., ::-1])
    (source,) = open_dataset(few_shot(tmp_path / "set", 1, tmp_path), frames=4).sets["y"]
    np.testing.assert_array_equal(np.stack(list(read_frames(source.path))), clip)


def test_a_finished_run_is_not_run_again(data: Path, tmp_path: Path) -> None:
    run, workers = run_of(tmp_path, data), Recorded()
    rows = rows_of_run(run, data, "test", workers)
    assert [row["method"] for row in rows] == ["tiny", "identity"], "a truth without values is no row"
    assert rows[0] | {"steps": 20, "seconds": 2.0, "psnr": 20.0, "spread": {"psnr": 0.5}} == rows[0]
    assert rows[0]["ours"] and rows[0]["fingerprint"] == run.fingerprint and rows[0]["cpu"] and "commit" in rows[0]
    assert (rows[1]["psnr"], rows[1]["seed"], rows[1]["data_seed"]) == (10.0, None, 0)
    assert [words[1] for words in workers.commands] == ["rlv2v.train", "rlv2v.evaluate"]
    again = Recorded()
    assert rows_of_run(run, data, "test", again) == rows and not again.commands
    assert {path.name for path in tmp_path.iterdir()} == {"mine-tiny-0", "mine-tiny-0.json"}


def test_what_is_missing_is_made_up_for(data: Path, tmp_path: Path) -> None:
    run, workers = replace(run_of(tmp_path, data), budgets=(2.0, 4.0)), Recorded()
    workers.fails = "rlv2v.evaluate"
    (row,) = rows_of_run(run, data, "test", workers)
    assert row["valid"] is False and row["steps"] is None
    again = Recorded()
    rows = rows_of_run(run, data, "test", again)
    assert [row.get("budget_s") for row in rows] == [2.0, 4.0, 0.0] and [row["steps"] for row in rows] == [20, 40, 0]
    assert [words[1] for words in again.commands] == ["rlv2v.evaluate", "rlv2v.train", "rlv2v.evaluate"]
    (late,) = rows_of_run(run, data, "val", again)
    assert late["valid"] is False, "after twice the budget, what half of it reached can no longer be measured"


def test_without_a_whole_checkpoint_a_training_starts_anew(data: Path, tmp_path: Path) -> None:
    run, workers = run_of(tmp_path, data), Recorded()
    workers.fails = "rlv2v.train"
    assert rows_of_run(run, data, "test", workers)[0]["valid"] is False
    (run.folder / "checkpoints" / "00000020").mkdir(parents=True)
    (run.folder / "half").touch()
    workers.fails = ""
    rows_of_run(run, data, "test", workers)
    assert "--resume" not in workers.commands[1] and not (run.folder / "half").exists()


def test_a_run_of_other_settings_is_refused(data: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, data)
    rows_of_run(run, data, "test", Recorded())
    for other, differing in (
        (replace(run, budgets=(3.0,)), "budgets"),
        (replace(run, flags=("--preset", "paper")), "flags"),
        (replace(run, digests={"data": "e"}), "data"),
        (run_of(tmp_path, data, lr=0.1), "lr"),
    ):
        with pytest.raises(UserError, match=f"another run, which differs in {differing}; choose another --out"):
            rows_of_run(other, data, "test", Recorded())
    run.journal_path.write_text("[1]")
    with pytest.raises(UserError, match="expected the journal of a run, got something else"):
        run.journal()
    run.journal_path.unlink()
    with pytest.raises(UserError, match="holds a run without a journal; choose another --out"):
        run.journal()


def test_code_that_changes_on_the_way_is_no_row(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(run_of(tmp_path, data), digests={"code": quality_runs.code_digest()})
    monkeypatch.setattr(quality_runs, "code_digest", lambda: "other")
    (row,) = rows_of_run(run, data, "test", Recorded())
    assert row["valid"] is False and "the code changed since the bench began" in capsys.readouterr().err


def test_a_command_that_fails_says_why_and_one_that_was_stopped_is_no_success(tmp_path: Path) -> None:
    with Workers(1, 1) as workers:
        for code, message in (
            ("import sys; sys.exit('why')", "^why$"),
            (f"import sys; print('stopped; {quality_runs.STOPPED} --out x', file=sys.stderr)", "stopped; go on with"),
            ("import os; os._exit(3)", "exit code 3"),
        ):
            with pytest.raises(RuntimeError, match=message):
                workers.python("-c", code)
        workers.python("-c", f"open({str(tmp_path / 'done')!r}, 'w')")
    assert (tmp_path / "done").exists()


def test_an_interruption_ends_what_runs(tmp_path: Path) -> None:
    code = f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(60)"
    start = time.monotonic()

    def wait() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), Workers(1, 1) as workers:
        job = workers._pool.submit(workers.python, "-c", code)
        wait()
    assert time.monotonic() - start < 30
    with pytest.raises(RuntimeError):
        job.result()


def plan_of(data: Path, out: Path, **changes: Any) -> quality.Plan:
    args = quality.Args(case=str(data), methods=("tiny",), seeds=(0, 1), frames=4, size=16, out=out, **changes).check()
    return quality.Plan(args, make_case(str(data), frames=4, size=16))


def test_runs_have_names_and_fingerprints_of_their_own(data: Path, tmp_path: Path) -> None:
    plan = plan_of(data, tmp_path)
    runs = [
        plan.run(m, few, seed, lr)
        for m in ("tiny", "paper")
        for few in (None, 1)
        for seed in (0, 1)
        for lr in (None, 0.1)
    ]
    assert len({run.fingerprint for run in runs}) == len({run.folder for run in runs}) == len(runs) == 16
    few = plan.run("paper", 1, 1, 0.1)
    assert few.folder.name == "mine-paper-few1-lr0.1-1" and few.data == tmp_path / "data-mine-few1"
    assert few.flags[-4:] == ("--lr", "0.1", "--disc-lr", "0.1") and "flip" in few.flags and "--chrono" not in few.flags
    assert plan.run("tiny", None, 0, None).fingerprint == runs[0].fingerprint
    assert plan.budgets == (300.0,) and plan.select == "psnr" and plan.split == "test"
    plan.case = replace(plan.case, kind="synth")
    told = {m: "--chrono" in plan.run(m, None, 0, None).flags for m in ("default", "rl", "paint", "paper", "cyclegan")}
    assert told == {"default": True, "rl": True, "paint": False, "paper": False, "cyclegan": False}


def test_the_best_learning_rate_is_that_of_val(data: Path, tmp_path: Path) -> None:
    rows = [
        {"method": "tiny", "few": None, "lr": lr, "psnr": value, "l1": -value}
        for lr, value in ((1e-3, 20.0), (2e-3, 23.0), (4e-3, None))
        if value
    ]
    rows.append({"method": "paper", "few": None, "lr": 9.0, "psnr": 99.0, "l1": -99.0})
    plan = plan_of(data, tmp_path, lr_search=(1e-3, 2e-3, 4e-3))
    assert plan.search_split == "val" and plan.best_lr(rows, "tiny", None) == 2e-3
    assert plan.best_lr(rows, "tiny", 5) == 1e-3, "no row: the first"
    by_error = plan_of(data, tmp_path, lr_search=(1e-3,), select="l1")
    assert by_error.best_lr(rows[:2], "tiny", None) == 2e-3


def test_mistakes_are_named(data: Path, tmp_path: Path) -> None:
    args = quality.Args(case=str(data), out=tmp_path / "out", frames=4, size=16)
    for changes, message in (
        ({"budget": 0.0}, "--budget: expected seconds > 0, got 0"),
        ({"steps": 0}, "--steps: expected at least 1, without --budget, got 0"),
        ({"jobs": 0}, "--jobs: expected at least 1, got 0"),
        ({"methods": ("cyclgan",)}, "--methods: expected default, .* got 'cyclgan'; did you mean cyclegan?"),
        ({"select": "psnrr"}, "--select: expected .* did you mean psnr?"),
        ({"seeds": (1, 1)}, "--seeds: expected values that differ, got 1 1"),
        ({"lr_search": (0.0,)}, "--lr-search: expected learning rates > 0, got 0"),
        ({"lr_search": (0.1,), "twice": True}, "--twice: expected no --lr-search with it"),
        ({"size": 20}, "--size: expected a multiple of 16"),
        ({"few": (9,)}, "--few: expected 1 to 7 target clips of mine, got 9"),
    ):
        with pytest.raises(UserError, match=message):
            quality.main(replace(args, **changes))
    assert not (tmp_path / "out").exists()


def test_the_table_comes_from_rows_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of main but the trainings: the search on val, the winner on the split, the curve."""
    workers = Recorded()
    monkeypatch.setattr(quality, "Workers", lambda *_: workers)
    args = quality.Args(
        case=str(data), methods=("tiny", "cyclegan"), seeds=(0, 1), frames=4, size=16, out=tmp_path, budget=2.0,
        few=(1, 3), lr_search=(0.001, 0.002),
    )  # fmt: skip
    quality.main(args)
    said = capsys.readouterr().out.splitlines()
    rows = json.loads(said[-1])["rows"]
    searched = [row for row in rows if row.get("search")]
    assert len(searched) == 8 and {row["split"] for row in searched} == {"val"}
    final = [row for row in rows if not row.get("search") and row["method"] != "identity"]
    assert [(r["method"], r["few"], r["seed"], r["lr"], r["split"]) for r in final] == [
        (method, few, seed, 0.001, "test") for few in (1, 3) for method in ("tiny", "cyclegan") for seed in (0, 1)
    ]
    assert [row["method"] for row in rows[-1:]] == ["identity"]
    trained = [words for words in workers.commands if words[1] == "rlv2v.train"]
    assert len(trained) == 12, "the winner of the search is not trained a second time"
    assert (
        "| psnr, target clips | 1 | 3 |" in said
        and "| cyclegan | 20.00 (20.00 to 20.00) | 20.00 (20.00 to 20.00) |" in said
    )
    assert cv2.imread(str(tmp_path / "mine-few.png")) is not None


def test_curves_are_medians_over_seeds() -> None:
    values = [("a", 5, 3.0), ("a", 1, 1.0), ("a", 1, 2.0), ("a", 1, 9.0), ("b", 1, 4.0)]
    rows: list[dict[str, Any]] = [{"method": m, "few": few, "psnr": value} for m, few, value in values]
    rows += [{"method": "a", "few": None, "psnr": 0.0}, {"method": "a", "few": 1, "psnr": 0.0, "search": True}]
    found = quality_few.curves(rows, "psnr")
    assert found == {"a": {1: [1.0, 2.0, 9.0], 5: [3.0]}, "b": {1: [4.0]}}
    assert quality_few.table(found, "psnr").splitlines() == [
        "| psnr, target clips | 1 | 5 |",
        "| --- | --- | --- |",
        "| a | 2.00 (1.00 to 9.00) | 3.00 |",
        "| b | 4.00 |  |",
    ]


@pytest.fixture
def command(data: Path, tmp_path: Path) -> Iterator[list[str]]:
    script = Path(quality.__file__)
    yield [
        *(sys.executable, str(script), "--case", str(data), "--methods", "tiny", "--frames", "4", "--size", "16"),
        *("--out", str(tmp_path / "out"), "--json", str(tmp_path / "rows.json")),
    ]


@pytest.mark.thorough
def test_an_interrupted_bench_goes_on(command: list[str], tmp_path: Path) -> None:
    """The first of two runs is finished and the second stopped on its way; then the second alone is resumed."""
    command = [*command, "--seeds", "0", "1", "--budget", "25"]
    bench = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    second = tmp_path / "out/mine-tiny-1"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not any((second / "checkpoints").glob("*")):
        time.sleep(0.2)
    time.sleep(3)
    bench.terminate()
    _, said = bench.communicate(timeout=60)
    assert bench.returncode == 130 and "the same command goes on" in said
    first = json.loads((tmp_path / "out/mine-tiny-0.json").read_text())
    assert len(first["rows"]) == 1 and not json.loads(second.with_name("mine-tiny-1.json").read_text())["rows"]
    steps = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows[0] == first["rows"][0] and rows[1]["steps"] > steps and 25 <= rows[1]["seconds"] < 35
    assert [row["method"] for row in rows] == ["tiny", "tiny", "identity", "constant", "truth", "target"]


@pytest.mark.thorough
def test_quality_of_a_short_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = quality.Args(
        case=str(data), methods=("tiny",), seeds=(0,), budget=4.0, frames=4, size=16, out=tmp_path, twice=True
    )
    quality.main(args)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["budget_s"] for row in rows] == [4.0, 8.0, 0.0, 0.0, 0.0, 0.0]
    assert rows[1]["steps"] > rows[0]["steps"] > 0 and rows[0]["psnr"] > 0 and rows[2]["method"] == "identity"


def test_a_run_that_fails_ends_the_bench_with_1(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    args = quality.Args(case=str(data), methods=("tiny",), seeds=(0,), frames=4, size=16, out=tmp_path)
    with pytest.raises(SystemExit) as stop:
        quality.main(args)
    assert stop.value.code == 1
