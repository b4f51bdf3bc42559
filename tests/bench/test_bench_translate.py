"""The bench of a translation: small pictures, every way, and an output that is wrong is seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import translate
from translate import ONE_CORE, WAYS, Args, Job, is_right, main, write_source

from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translate, "SHAPE", (160, 96))


def test_every_way_gives_the_whole_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "source.mp4", 10)
    job = Job(tmp_path / "source.mp4", tmp_path)
    monkeypatch.setattr(translate, "JOB", [job])
    for name in ("translate", "without overlap"):
        job.out.unlink(missing_ok=True)
        WAYS[name](job, 10)
        assert is_right(10) and not is_right(11)
    WAYS["codecs alone"](job, 10)
    WAYS["network alone"](job, 10)
    write_clip(job.out, np.zeros((10, 96, 160, 3), np.uint8), 24)
    assert not is_right(10)
    with pytest.raises(UserError, match="--frames: expected at least 8, got 3"):
        main(Args(frames=3))


@pytest.mark.thorough
def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Args(frames=8, rounds=2, json=tmp_path / "out.json"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    rows = {(row["pass"], row["backend"]): row for row in result["rows"]}
    assert set(rows) == {("quiet", name) for name in WAYS} | {("busy core", name) for name in ("translate", ONE_CORE)}
    ours = rows["quiet", "translate"]
    assert ours["valid"] and ours["frames_per_s"] > 0 and set(ours["speedup_over"]) == {"without overlap"}
    parts = [rows["quiet", name]["median_us"] for name in ("codecs alone", "network alone")]
    assert ours["percent_of_limit"] == pytest.approx(100 * max(parts) / ours["median_us"], abs=0.1)
    assert set(rows["busy core", "translate"]["speedup_over"]) == {ONE_CORE}
