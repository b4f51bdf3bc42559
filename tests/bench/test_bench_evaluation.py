"""The bench of an evaluation: one short clip, every metric that needs no network."""

from __future__ import annotations

import json

import evaluation
import pytest


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
def test_an_evaluation_is_timed_with_all_metrics(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "FRAMES", 34)
    evaluation.main(evaluation.Args(rounds=1))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["case"] for row in rows] == [f"1280x720, 34 frames, {case}" for case in ("alone", "beside a busy core")]
    assert all(row["valid"] and row["seconds"] > 0 for row in rows)
