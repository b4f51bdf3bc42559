"""What DALI's errors are blamed on: a file, the machine's memory, or its driver. The graph is simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlv2v.crop_size import CropSize
from rlv2v.data import dali
from rlv2v.data.index import open_dataset
from rlv2v.data.sampler import ClipSampler, Unreadable
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.runtime.device import out_of_memory

MEMORY = "Critical error in pipeline: CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory"
LIBRARY = "Error when executing GPU operator, encountered: Failed to load libnvcuvid.so, needed by NVDEC C++ context: 1"
FILE = "Error in thread 0: encountered: Failed to open the video file"


def reader_that_fails(root: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], str]) -> dali.GraphReader:
    """Return a reader of X whose graphs of so many clips fail with what `fails` says of the number, "" for none."""
    for name in ("trainX", "trainY"):
        (root / name).mkdir()
        for number in range(3):
            write_clip(root / name / f"{number}.mp4", np.zeros((4, 16, 16, 3), np.uint8), 8, "vp9-lossless")

    class Graph:
        end = 10**6

        def __init__(self, options: dali.GraphOptions, first: int, steps: Any, links: Any) -> None:
            self.num = options.batch

        def gives(self, step: int, samples: Any) -> bool:
            return True

        def take(self) -> torch.Tensor:
            if message := fails(self.num):
                raise RuntimeError(message)
            return torch.zeros(self.num, 4, 16, 16, 3, dtype=torch.uint8)

    monkeypatch.setattr(dali, "GraphRun", Graph)
    sampler = ClipSampler(open_dataset(root, frames=4), {"x": 2, "y": 1}, 4, 0, 0, 1, "none")
    reader = dali.GraphReader(sampler, "x", size=CropSize(16, 16), device="cpu")
    reader.prepare(0)
    return reader


@pytest.mark.parametrize("alone", [False, True])
def test_no_file_is_blamed_for_a_want_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """Whether the batch's graph fails by it, or that of a file alone after another error."""
    reader = reader_that_fails(tmp_path, monkeypatch, lambda num: MEMORY if num == 1 or not alone else "no reason")
    with pytest.raises(RuntimeError, match="cudaErrorMemoryAllocation") as error:
        reader.take(0)
    assert out_of_memory(error.value), "which training answers with what a step needs"
    reader.close()


def test_a_missing_library_of_the_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_that_fails(tmp_path, monkeypatch, lambda num: LIBRARY)
    with pytest.raises(
        UserError, match=r"--decode gpu: a library of .* missing \(Failed to load libnvcuvid.so, needed"
    ):
        reader.take(0)
    reader.close()


def test_a_file_is_blamed_for_what_fails_with_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_that_fails(tmp_path, monkeypatch, lambda num: FILE)
    with pytest.raises(Unreadable) as error:
        reader.take(0)
    assert {source.path.parent.name for source in error.value.faults} == {"trainX"}
    reader.close()
    (tmp_path / "again").mkdir()
    reader = reader_that_fails(tmp_path / "again", monkeypatch, lambda num: FILE if num > 1 else "")
    with pytest.raises(UserError, match="step 0: DALI reads each file but not the batch: Failed to open"):
        reader.take(0)
    reader.close()
