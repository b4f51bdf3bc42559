"""Whether each metric ranks a known better translation above a known worse one."""

from __future__ import annotations

from pathlib import Path

import pytest
from metric_cases import CANDIDATES, night, references, rows, scene

from rlv2v.metrics import METRICS, Row, clip_metrics

WORSE = set(CANDIDATES) - {"truth"}
UNSEEN: dict[str, set[str]] = {
    "l1": set(),
    "psnr": set(),
    "ssim": set(),
    "flicker": set(),
    "warping_error": {"blurred", "fading", "wrong domain", "constant", "memorised"},
    "warping_ratio": {"blurred", "fading", "wrong domain", "constant", "memorised"},
    "first_frame_jump": WORSE - {"flash", "fading"},
    "drift": {"blurred", "noisy", "identity", "memorised"},
    "sharpness": {"shuffled", "flash", "fading", "wrong domain", "identity", "memorised"},
    "edge_agreement": {"flash", "fading", "identity"},
    "cycle_error": {"identity"},
    "colour_distance": {"shuffled", "memorised"},
    "region_colour_distance": {"shuffled", "memorised"},
    "patch_distance": {"shuffled", "memorised"},
    "detail_distance": {"shuffled", "flash", "fading", "wrong domain", "memorised"},
    "kid": {"shuffled", "memorised"},
    "nearest_training": WORSE - {"blurred", "constant", "memorised"},
}
"""What each metric cannot tell from the truth, or prefers to it. All other candidates it ranks below."""


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    return rows(references(tmp_path_factory.mktemp("target") / "trainY"))


def test_every_metric_is_in_the_table() -> None:
    synthetic_or_learned = {name for name, m in METRICS.items() if m.needs & {"synthetic", "fid", "fvd", "lpips"}}
    assert set(UNSEEN) == set(METRICS) - synthetic_or_learned


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("candidate", sorted(WORSE))
def test_the_truth_beats_what_is_worse(scores: dict[str, Row], name: str, candidate: str) -> None:
    if candidate in UNSEEN[name]:
        words = {"identity": ("copied", "copies", "copying"), "constant": ("constant",)}.get(candidate, ("",))
        assert any(word in METRICS[name].meaning for word in words)
        return
    best, worse = scores["truth"][name], scores[candidate][name]
    assert best is not None and worse is not None
    assert METRICS[name].badness(best) < METRICS[name].badness(worse)


@pytest.mark.parametrize("name", ["colour_distance", "region_colour_distance", "patch_distance", "kid"])
def test_the_halves_of_the_target_set_are_nearer_than_another_domain(
    scores: dict[str, Row], tmp_path: Path, name: str
) -> None:
    first, second = references(tmp_path / "trainY").halves(72)
    metric = METRICS[name]
    within = metric.reduce(first[name], second[name])
    assert within is not None
    assert all(within < value / 2 for c in ("identity", "wrong domain", "noisy") if (value := scores[c][name]))


def test_equal_clips_give_equal_values() -> None:
    x, y = scene(5), night(scene(5))
    first, second = (clip_metrics(y.copy(), x.copy(), y.copy()) for _ in range(2))
    assert [name for name in first if first[name] is None] == [name for name in second if second[name] is None]
    known = [name for name in first if first[name] is not None]
    close = pytest.approx([second[name] for name in known], rel=1e-9)  # the order of sums follows addresses
    assert [first[name] for name in known] == close
