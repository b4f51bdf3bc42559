"""The bench of the criteria, on runs whose order is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import criterion
import pytest

from rlv2v.errors import UserError
from rlv2v.metrics import METRICS
from rlv2v.metrics.criterion import CRITERIA, DEFAULT


def line(step: int, distance: float, l1: float) -> dict[str, Any]:
    """A checkpoint that is at a distance to the target set, and has an error."""
    row: dict[str, Any] = dict.fromkeys(METRICS) | {"edge_agreement": 1.0, "sharpness": 1.0, "warping_ratio": 1.0}
    looks = ("patch_distance", "kid", "region_colour_distance", "colour_distance")
    truth = {"l1": l1, "psnr": 20 - 10 * l1, "ssim": 1 - l1}
    return {
        **{"step": step, "seconds": 1.0 * step, "criterion": distance},
        **{"metrics": row | dict.fromkeys(looks, distance), "identity": row | dict.fromkeys(looks, 1.0)},
        **{"truth": truth, "identity_truth": {"l1": 0.9, "psnr": 11.0, "ssim": 0.1}},
    }


def run_of(path: Path, *checkpoints: tuple[float, float]) -> Path:
    path.mkdir()
    lines = (line(step, *checkpoint) for step, checkpoint in enumerate(checkpoints))
    (path / "selection.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def rows_by_name(capsys: pytest.CaptureFixture[str], *runs: str) -> dict[tuple[str, str], dict[str, Any]]:
    criterion.main(criterion.Args(runs=runs))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["default"] == DEFAULT
    return {(row["case"], row["backend"]): row for row in result["rows"]}


def test_correlations_are_those_of_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = run_of(tmp_path / "good", (0.9, 0.8), (0.5, 0.3), (0.7, 0.5))  # its best is not its last
    bad = run_of(tmp_path / "bad", (0.2, 0.7), (0.3, 0.6), (0.4, 0.4))  # nearer looks, larger errors
    rows = rows_by_name(capsys, f"a={good}", f"b={bad}")
    looks, newest = rows["a", "looks"], rows["a", "newest"]
    assert looks["spearman"] == looks["l1"] == looks["within_run"] == pytest.approx(1.0)
    assert (looks["lost_db"], newest["lost_db"]) == (0.0, pytest.approx(2.0))
    assert newest["within_run"] == pytest.approx(0.5)
    looks = rows["b", "looks"]
    assert (looks["within_run"], looks["spearman"]) == (pytest.approx(-1.0), pytest.approx(0.2))
    assert rows["pooled", "looks"]["spearman"] == pytest.approx(0.6) and rows["pooled", "looks"]["num"] == 8
    assert rows["a", "edges"]["spearman"] is None, "what is always the same orders nothing"
    assert {name for _, name in rows} == {*CRITERIA, "newest"}
    both = rows_by_name(capsys, f"a={good}", f"a={bad}")["a", "looks"]
    assert both["methods"] == pytest.approx(1.0) and both["num"] == 7 and both["num_runs"] == 2


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    empty = run_of(tmp_path / "empty")
    blind = run_of(tmp_path / "blind", (0.5, 0.5))
    path = blind / "selection.jsonl"
    path.write_text(path.read_text().replace(json.dumps(line(0, 0.5, 0.5)["truth"]), "null", 1))
    for runs, message in (
        ((), "expected at least one TASK=RUN"),
        (("folder",), "expected TASK=RUN, got folder"),
        ((f"a={empty}",), "expected a line for each checkpoint, got none"),
        ((f"a={blind}",), "expected what a truth says of each checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            criterion.main(criterion.Args(runs=runs))
