"""bench/harness.py: turns, ratios, limits and the JSON; and every bench can be imported and asked for help."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import Args, Bench, Contender, DeviceArgs, TimedArgs

from rlv2v.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPTS = sorted(path.stem for path in Path(harness.__file__).parent.glob("*.py"))
WITH_ARGS = [name for name in SCRIPTS if not name.startswith(("harness", "convlstm_", "data_", "quality_", "replay_"))]
KEYS = ["case", "backend", "pass", "dtype", "median_us", "p20_us", "p80_us", "percent_of_limit", "speedup_over"]


def row(**changes: Any) -> harness.Row:
    return {"case": "a", "backend": "rlv2v", "ours": True, "valid": True} | changes


def test_the_json_has_the_fields_that_scripts_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    with Bench("losses", Args(json=file, threads=1), split="test") as bench:
        bench.skip("peer", "no wheel")
        bench.add([row(nan=float("nan"), nested=[{"inf": float("inf")}])], extra=1)
    line = capsys.readouterr().out.splitlines()[-1]
    result = json.loads(line)
    assert file.read_text() == line + "\n" and [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert list(result)[:3] == ["bench", "commit", "machine"] and list(result)[-1] == "rows"
    assert result["bench"] == "losses" and result["split"] == "test" and result["extra"] == 1
    assert list(result["machine"]) == ["cpu", "gpu", "threads", "torch", "triton"]
    assert result["machine"]["threads"] == 1 and result["machine"]["torch"] == torch.__version__
    assert result["missing"] == {"peer": "no wheel"}
    assert result["rows"] == [row(nan=None, nested=[{"inf": None}])]


def test_an_interrupted_bench_keeps_its_finished_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt), Bench("losses", Args(json=file)) as bench:
        bench.add([row(case="first")])
        bench.add([row(case="second")])
        raise KeyboardInterrupt
    assert [each["case"] for each in json.loads(file.read_text())["rows"]] == ["first", "second"]
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == ["case first", "case second"]


def test_a_wrong_number_of_ours_ends_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with Bench("losses", Args()) as bench:
        bench.add([row(backend="peer", ours=False, valid=False), row(valid=None), row()])
    with pytest.raises(SystemExit, match="1"), Bench("losses", Args()) as bench:
        bench.add([row(valid=False), row()])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][0]["valid"] is False


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for args, message in (
        (Args(json=tmp_path / "missing" / "out.json"), r"--json .*out\.json: its folder does not exist"),
        (Args(threads=0), "--threads: expected at least 1, got 0"),
        (TimedArgs(rounds=1), "--rounds: expected at least 2, got 1"),
        (DeviceArgs(device="cuda"), "--device cuda: PyTorch sees no GPU"),
    ):
        with pytest.raises(UserError, match=message):
            Bench("losses", args)
    assert TimedArgs(rounds=15).num_rounds == 15 and TimedArgs(rounds=15, quick=True).num_rounds == 5
    with pytest.raises(RuntimeError, match=r"exit code 3\nwhy"):
        harness.run_python("-c", "import sys; print('why', file=sys.stderr); sys.exit(3)")


def test_turns_are_shuffled_and_short_calls_repeated_after_one_that_does_not_count() -> None:
    calls, collecting = list[str](), set[bool]()

    def contender(name: str, us: float) -> Contender:
        def call() -> float:
            calls.append(name)
            collecting.add(gc.isenabled())
            return us

        return Contender(name, call, setup=lambda: calls.append(f"setup of {name}"))

    microseconds = {"a": 5000.0, "b": 6000.0, "c": 7000.0, "short": 400.0}
    contenders = [contender(name, us) for name, us in microseconds.items()]
    times = harness.time_in_turns(contenders, 12, lambda call: float(call()))  # type: ignore[arg-type]
    assert calls[::2] == [f"setup of {name}" for name in calls[1::2]], "each call comes after its setup"
    assert calls[1:16:2] == [name for name in microseconds for _ in range(2)], "two of each warm up"
    timed, rest = list[str](), iter(calls[17::2])
    for name in rest:
        timed.append(name)
        assert name != "short" or [next(rest) for _ in range(5)] == ["short"] * 5
    rounds = [tuple(timed[k : k + 4]) for k in range(0, len(timed), 4)]
    assert len(rounds) == 12 and all(sorted(one) == list(microseconds) for one in rounds) and len(set(rounds)) > 4
    assert calls.count("short") == 2 + 12 * (1 + 5)
    assert times == {(name, "float32"): [us] * (60 if us < 2000 else 12) for name, us in microseconds.items()}
    assert gc.isenabled() and collecting == {True, False}


def test_the_garbage_collector_is_back_after_an_error() -> None:
    calls = iter([5001.0, 5001.0])  # the warm-up; then StopIteration
    with pytest.raises(StopIteration):
        harness.time_in_turns([Contender("a", lambda: next(calls))], 2, lambda call: float(call()))  # type: ignore[arg-type]
    assert gc.isenabled()


def test_rows_compare_like_with_like() -> None:
    work = {"gflop_s": 1e6, "gb_s": 6e3}
    contenders = [
        Contender("eager"),
        Contender("compile", group="compiled"),
        Contender("compile channels-last", group="compiled"),
        Contender("eager", dtype="bfloat16"),
        Contender("cpu", work=work, ours=True, fields={"difference": 0.5}),
        Contender("cpu", dtype="bfloat16", work=work, ours=True),
        Contender("GEMM", work={"gflop_s": 1e6}, limit=True),
        Contender("copy", work={"gb_s": 2e3}, limit=True),
        Contender("wrong", valid=False, fields={"difference": 9.0}),
    ]
    medians = [9.0, 7.0, 5.0, 8.0, 4.0, 2.0, 2.0, 1.0]
    times = {one.key: [us - 1, us, us + 1] for one, us in zip(contenders, medians, strict=False)}
    rows = harness.rows_of("a case", "forward", contenders, times)
    assert all(list(each)[:9] == KEYS and each["case"] == "a case" and each["pass"] == "forward" for each in rows)
    fp32, bf16, wrong = rows[4], rows[5], rows[8]
    assert (fp32["p20_us"], fp32["median_us"], fp32["p80_us"]) == (3.4, 4.0, 4.6)
    best = {"best compiled": 1.25, "compile channels-last": 1.25}
    assert fp32["speedup_over"] == {"eager": 2.25, "compile": 1.75, **best}, "neither the wrong one nor ours"
    assert fp32["percent_of_limit"] == 75.0, "the copy takes 3 us for its bytes, the GEMM 2 us for its FLOPs"
    assert fp32["gflop_s"] == 250.0 and fp32["difference"] == 0.5 and fp32["valid"] and fp32["ours"]
    assert bf16["speedup_over"] == {"eager": 4.0} and bf16["percent_of_limit"] is None
    assert rows[6]["speedup_over"] == {} and rows[6]["percent_of_limit"] is None
    assert not wrong["valid"] and wrong["median_us"] is None and wrong["speedup_over"] == {}


def test_what_is_not_valid_is_never_timed() -> None:
    rows = harness.compare("a", "forward", [Contender("a"), Contender("b", lambda: 1 / 0, valid=False)], 2)
    assert [each["valid"] for each in rows] == [True, False] and rows[0]["p20_us"] <= rows[0]["p80_us"]


def test_a_copy_moves_the_bytes_that_it_stands_for() -> None:
    copy = harness.copy_limit(1000, "bfloat16")
    target = copy.call()
    assert isinstance(target, torch.Tensor) and 2 * target.nbytes == copy.work["gb_s"] == 1000
    assert copy.limit and copy.dtype == "bfloat16"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bench_can_be_imported_and_has_the_shared_flags(name: str) -> None:
    module = importlib.import_module(name)
    if name in WITH_ARGS and name not in ("tasks", "picture"):
        assert {"json", "quick"} <= {one.name for one in fields(getattr(module, "Args", harness.DeviceArgs))}
    assert module.__doc__.splitlines()[0].endswith(".")


@pytest.mark.thorough
@pytest.mark.parametrize("name", WITH_ARGS)
def test_help_is_there(name: str) -> None:
    command = [sys.executable, Path(harness.__file__).with_name(f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"usage: python {command[1]}" in done.stdout
