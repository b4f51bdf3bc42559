"""Ranks of torchrun share the videos of one command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processes import finish
from ranks import start_ranks


@pytest.mark.thorough
def test_ranks_share_the_videos_and_the_first_sums_up(tiny_run: Path, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in ("a", "b", "d"):
        np.save(videos / f"{name}.npy", np.zeros((2, 16, 16, 3), np.uint8))
    (videos / "c.npy").write_bytes(b"no video")
    codes, errors = finish(*start_ranks(2, "-m", "rlv2v.translate", tiny_run, videos, out, "--device", "cpu"))
    assert codes == [2, 2], errors
    assert f"3 translated, 0 skipped, 1 failed: {videos / 'c.npy'}" in errors[0]
    assert "b.npy:" in errors[1] and "failed" not in errors[1], "each has its share"
    assert sorted(p.name for p in out.iterdir()) == ["a.mp4", "b.mp4", "d.mp4"]
