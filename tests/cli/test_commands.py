"""All commands: help, errors on one line, exit codes, the console script, and one chain through them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import processes
import pytest
from commands import Command, refusal

import rlv2v
from rlv2v import cli
from rlv2v.data.video import probe


def test_the_console_script_prints_an_overview_and_its_version(command: Command) -> None:
    code, out, _ = command()
    assert code == 0 and (0, out, "") == command("--help")
    assert all(
        f"  {name} " in out for name in ("synth", "prepare", "train", "translate", "export", "evaluate", "report")
    )
    assert len(out.splitlines()) < 25 and "rlv2v train --out" in out
    assert command("--version") == (0, f"rlv2v {rlv2v.__version__}\n", "")
    assert rlv2v.__version__ == version("rlv2v")


def test_an_unknown_command_is_named_with_the_nearest(command: Command) -> None:
    names = "synth, prepare, train, translate, export, evaluate, report"
    assert refusal(command("tran")) == f"rlv2v: expected {names}, got 'tran'; did you mean train?"
    assert refusal(command("quux")) == f"rlv2v: expected {names}, got 'quux'"


def test_the_package_runs_as_a_program() -> None:
    line = [sys.executable, "-m", "rlv2v", "synth", "--sise", "3"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "rlv2v.synth: unknown option --sise; did you mean --size?\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_opens_with_a_summary_and_an_example(name: str, command: Command) -> None:
    code, out, err = command(name, "--help")
    lines = out.splitlines()
    assert code == 0 and not err
    assert lines[0].startswith(f"usage: python -m rlv2v.{name} ") and lines[2][0].isupper()
    example = [line for line in lines[:8] if line.startswith(f"example: python -m rlv2v.{name} ")]
    assert len(example) == 1
    options = {word for word in example[0].split() if word.startswith("--")}
    assert all(f"{option} " in out.replace(example[0], "") for option in options), "the example's options exist"


def test_the_flags_of_training_are_grouped_by_section(command: Command) -> None:
    out = command("train", "--help")[1]
    groups = ["data", "model", "loss", "optim", "rl", "runtime", "checkpoint"]
    places = [out.index(f" {group} options ") for group in groups]
    flags = ["--batch-x", "--widths", "--cycle", "--disc-lr", "--gamma", "--precision", "--keep"]
    assert places == sorted(places)
    for flag, start, end in zip(flags, places, [*places[1:], len(out)], strict=True):
        assert start < out.index(f" {flag} ") < end
    text = " ".join(cli.unboxed(out).split())
    for words in (
        "--frames INT Clip length T in frames. (default: 8)",
        "--cycle FLOAT Added term: weight of |G_X(G_Y(x)) - x| and its mirror. (default: 10.0)",
        "transition: log D(a) - c ||a - a_true||, for each transition.",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("train --sise 3", "unknown option --sise; did you mean --size?"),
        ("train --loader_thread=3", "unknown option --loader-thread; did you mean --loader-threads?"),
        ("train --no-rll", "unknown option --no-rll; did you mean --no-rl?"),
        ("train --lr 1 quux", "unexpected argument 'quux'"),
        (
            "train --preset tinny",
            "--preset: expected default, paint, paper, paper-letter, tiny, laptop, workstation, gpu24, gpu80, got "
            "'tinny'; did you mean tiny?",
        ),
        (
            "train --method cylegan",
            "--method: expected rlv2v, colour-map, colour-map-index, colour-map-transport, cyclegan, recycle-gan, got "
            "'cylegan'; did you mean cyclegan?",
        ),
        ("train --size", "--size: expected SIDE|HEIGHTxWIDTH, got nothing"),
        ("train --budget --seed 3", "--budget: expected FLOAT, got nothing"),
        ("train --betas 1", "--betas: expected FLOAT FLOAT, got '1'"),
        ("train --steps x", "--steps: expected INT, got 'x'"),
        ("train --disc_lr=x", "--disc-lr: expected FLOAT, got 'x'"),
        ("train --widths 1 x --seed 1", "--widths: expected INT INT ..., got '1 x'"),
        ("synth out --counts.x q", "--counts.x: expected INT, got 'q'"),
        ("synth out --sed 3", "unknown option --sed; did you mean --seed?"),
        ("prepare a b --jbos 3", "unknown option --jbos; did you mean --jobs?"),
        ("prepare a b --store row", "--store: expected auto, raw, video, got 'row'; did you mean raw?"),
        ("translate", "missing RUN, IN, OUT; --help describes them"),
        ("translate run in.mp4", "missing OUT; --help describes it"),
        ("translate run in.mp4 out.mp4 more.mp4", "unexpected argument 'more.mp4'"),
        ("translate run in.mp4 --newset", "unknown option --newset; did you mean --newest?"),
        ("translate run in.mp4 out.mp4 --size big", "--size: expected INT, got 'big'"),
        ("export run", "missing OUT; --help describes it"),
        ("evaluate run", "missing --data PATH; --help describes it"),
        ("evaluate run --data mine --split tets", "--split: expected val, test, train, got 'tets'; did you mean test?"),
        ("evaluate run --data", "--data: expected PATH, got nothing"),
        ("report", "missing RUN; --help describes it"),
        ("report run --clips few", "--clips: expected INT, got 'few'"),
        ("report run --splt val", "unknown option --splt; did you mean --split?"),
    ],
)
def test_a_bad_command_line_is_one_sentence(arguments: str, line: str, command: Command) -> None:
    name = arguments.split()[0]
    assert refusal(command(*arguments.split())) == f"rlv2v.{name}: {line}"


def test_an_error_of_an_unknown_form_is_joined_to_one_line() -> None:
    assert cli.explain("  Odd news\n   from  another version \n", "usage", ["--"]) == "unknown option --"
    assert cli.explain("  Odd news\n   from  another version \n", "usage", []) == "Odd news from another version"
    error = "invalid choice 'b' for argument '--a'. Expected\none of ('bb', 'c')."
    assert cli.explain(error, "usage: --a", ["--a", "b"]) == "--a: expected bb, c, got 'b'; did you mean bb?"
    assert cli.explain("Error parsing --a: it is odd", "usage: --a", ["--a", "b"]) == "--a: expected a value, got 'b'"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (rlv2v.errors.UserError("a\nb"), "a\\nb"),
        (OSError(errno.ENOSPC, "No space left", "file"), "file: No space left; free space or choose another folder"),
        (OSError(errno.EBADF, "Bad file"), None),
        (RuntimeError("a bug keeps its traceback"), None),
    ],
)
def test_mistakes_and_full_disks_exit_with_2_and_one_line(
    error: Exception, line: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: dict[str, str]) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["test"])
    with pytest.raises(type(error) if line is None else SystemExit) as stop:
        cli.run_command(fail, dict[str, str])
    if line is not None:
        assert getattr(stop.value, "code", None) == 2
        (printed,) = capsys.readouterr().err.splitlines()
        assert printed.endswith(f": {line}")


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["test"])
    with pytest.raises(SystemExit, match="130"):
        cli.run_command(lambda _: signal.raise_signal(signal.SIGINT), dict[str, str])
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.endswith(": stopped by SIGINT")


@pytest.mark.parametrize(
    "program",
    [("-m", "rlv2v.translate"), ("-m", "rlv2v", "train"), ("-c", "from rlv2v.cli import main; main()", "report")],
)
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path: Path, program: tuple[str, ...]) -> None:
    """Some of what is imported takes any exception for a missing library, and goes on."""
    code = "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: raise SystemExit(7)"
    for name in ("av", "torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(code)
    process = processes.start(*program, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{processes.ROOT}"})
    assert processes.finish(process) == ([130], ["rlv2v: stopped by SIGINT\n"])


def test_train_translate_evaluate_report(data: Path, tmp_path: Path, command: Command) -> None:
    run, out, result = tmp_path / "deep" / "run", tmp_path / "out.mp4", tmp_path / "result.json"
    source = next((data / "testX").iterdir())
    for arguments in (
        ("train", "--preset", "tiny", "--data", data, "--out", run),
        ("translate", run, source, out, "--side-by-side"),
        ("evaluate", run, "--data", data, "--json", result),
        ("report", run, "--clips", 1),
    ):
        code, _, err = command(*arguments)
        assert code == 0, err
    left = {"config.json", "metrics.jsonl", "model.safetensors", "checkpoints", "samples", "tensorboard", "report"}
    assert left <= {path.name for path in run.iterdir()}
    assert (probe(out).num_frames, probe(out).width) == (4, 32)
    rows = json.loads(result.read_text())["rows"]
    page = (run / "report" / "index.html").read_text()
    assert f">{rows['model']['l1']:.4f}<" in page, "its own data is measured by default"
    assert page.count('id="video-') == 1 and '<figure data-name="loss_d">' in page and "data:image/png" in page
