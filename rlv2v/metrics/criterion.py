"""The criterion that ranks the checkpoints of a run without a truth: one number, the lower, the better.

A candidate is a function of two rows of metrics that need no truth: the translation's, and that of the source, copied.
`bench/criterion.py` says how each of them ranks checkpoints and methods beside the hidden truth; `DEFAULT` is chosen by
that (docs/metrics.md). A metric alone is no criterion: a copy has perfect content, and a repeated target frame has
perfect looks. So a candidate adds how far the looks are from the target set and how much of the content is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rlv2v.metrics import Row

WORST = 2.0  # of each part, so that one flat frame does not decide alone
SMALL = 1e-6
Score = Callable[[Row, Row], float]


@dataclass(frozen=True)
class Criterion:
    """Describe a candidate; `score(own, identity)` returns its number, finite and the lower the better."""

    name: str
    formula: str
    score: Score


def share(name: str) -> Score:
    """Return a distance to the target set over that of the source, copied: 1 for a copy, near 0 for the target."""

    def score(own: Row, identity: Row) -> float:
        value, copied = own[name], identity[name]
        if value is None or copied is None:
            return 1.0
        return min(WORST, max(0.0, value) / max(copied, SMALL))

    return score


def root(score: Score) -> Score:
    """Return the square root of a share: of a squared distance, such as KID, the share of the distance."""
    return lambda own, identity: math.sqrt(score(own, identity))


def half(score: Score) -> Score:
    """Return half of a part."""
    return lambda own, identity: 0.5 * score(own, identity)


def lost_edges(own: Row, _identity: Row) -> float:
    """Return 1 - edge_agreement; 1 where the translation is flat."""
    value = own["edge_agreement"]
    return 1.0 if value is None else 1.0 - value


def lost_detail(own: Row, identity: Row) -> float:
    """Return how far log sharpness is from what lies between the source's and the target's, at most 2; 2 if flat.

    With s = |log sharpness| from the source, d and D the `detail_distance` of the translation and of the source to the
    target: (s + d - D) / 2, which is 0 in between. A drawing may be sharper than its photo, and a copy loses nothing.
    """
    value = own["sharpness"]
    if value is None or value <= 0:
        return WORST
    off = abs(math.log(value))
    to_target, whole = own.get("detail_distance"), identity.get("detail_distance")
    if to_target is not None and whole is not None:
        off = max(0.0, (off + to_target - whole) / 2)
    return min(WORST, off)


def unsteady(own: Row, _identity: Row) -> float:
    """Return log(warping_ratio) where the translation is less steady than its source, at most 2; else 0."""
    value = own["warping_ratio"]
    return 0.0 if value is None or value <= 1 else min(WORST, math.log(value))


def total(*parts: Score) -> Score:
    """Return the sum of the parts."""
    return lambda own, identity: sum(part(own, identity) for part in parts)


PATCHES, KID, REGIONS, COLOURS = map(share, ("patch_distance", "kid", "region_colour_distance", "colour_distance"))
FEATURES = root(KID)
CRITERIA: dict[str, Criterion] = {
    name: Criterion(name, formula, score)
    for name, formula, score in (
        ("patches", "patch_distance / identity's", PATCHES),
        ("kid", "kid / identity's", KID),
        ("regions", "region_colour_distance / identity's", REGIONS),
        ("colours", "colour_distance / identity's", COLOURS),
        ("edges", "1 - edge_agreement", lost_edges),
        ("detail", "how far log sharpness is from between source and target", lost_detail),
        ("steadiness", "log warping_ratio above 1", unsteady),
        ("content", "edges + detail", total(lost_edges, lost_detail)),
        ("patches+edges", "patches + edges", total(PATCHES, lost_edges)),
        ("kid+edges", "kid + edges", total(KID, lost_edges)),
        ("features", "sqrt(kid)", FEATURES),
        ("features+content", "features + edges + detail", total(FEATURES, lost_edges, lost_detail)),
        (
            "features+colour+content",
            "features + regions / 2 + edges + detail",
            total(FEATURES, half(REGIONS), lost_edges, lost_detail),
        ),
        ("regions+edges", "regions + edges", total(REGIONS, lost_edges)),
        ("looks", "patches + regions", total(PATCHES, REGIONS)),
        ("looks+edges", "patches + regions + edges", total(PATCHES, REGIONS, lost_edges)),
        ("looks+content", "patches + regions + edges + detail", total(PATCHES, REGIONS, lost_edges, lost_detail)),
        (
            "looks+content+steadiness",
            "patches + regions + edges + detail + steadiness",
            total(PATCHES, REGIONS, lost_edges, lost_detail, unsteady),
        ),
    )
}
DEFAULT = "features+colour+content"


def criterion(own: Row, identity: Row) -> float:
    """Return the default candidate's number for a translation, beside the source, copied; the lower, the better."""
    return CRITERIA[DEFAULT].score(own, identity)
