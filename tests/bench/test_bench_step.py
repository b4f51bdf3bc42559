"""bench/step.py: a step by itself, and that it is few operators."""

from __future__ import annotations

import json

import pytest
import step
import torch

from rlv2v.errors import UserError
from rlv2v.method.memory import some_clips
from rlv2v.method.step import Algorithm

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("case", "most"), [("default:16", 3000), ("paint:16", 4500), ("workstation:16", 4500)])
def test_a_step_is_few_kernels(case: str, most: int) -> None:
    """On a GPU each of them waits for its launch; a step has as many whatever the size of the frames."""
    config = step.config_of(case, "cpu")[0].replace(batch_pool=1)
    algorithm = Algorithm(config, torch.device("cpu"))
    algorithm.start()
    for _ in range(2):  # the first one makes the constants
        clips = some_clips(config, 1)
        with step.CountKernels() as count:
            algorithm.step(clips)
        algorithm.advance(0.0)
    assert 0.5 * most < count.num <= most, count.num


def test_a_step_is_timed_and_its_clips_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    step.main(step.Args(case=("tiny:16:2",), rounds=2))
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["case"] == "tiny 16 T=4 x2" and row["dtype"] == "float32"
    assert row["clips"] == 2 * (2 + 6 + 1 + 2 + 12), "of X, its pool, Y, Z and their pools"
    assert row["clips_per_s"] == pytest.approx(1e6 * row["clips"] / row["median_us"], rel=0.01)
    assert 500 < row["kernels"] < 5000 and row["valid"]


@pytest.mark.parametrize("case", ["tiny", "tiny:16:0", "tiny:x"])
def test_cases_that_are_none_are_named(case: str) -> None:
    with pytest.raises(UserError, match=r"--case: expected preset:size\[:factor\], as default:64:4, got"):
        step.main(step.Args(case=("tiny:16", case)))
    with pytest.raises(UserError, match=r"--case: expected .* got 'tinny'; did you mean tiny\?"):
        step.main(step.Args(case=("tinny:16",)))
