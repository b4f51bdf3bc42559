"""The methods that `--method` names: ours, and the baselines that share its loader, budget, evaluation and report.

To add one, write a module with a `METHOD` and list it here.
"""

from __future__ import annotations

from rlv2v.method.baselines import colour_map, cyclegan, ours, recycle_gan
from rlv2v.method.baselines.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ours.METHOD,
        *colour_map.METHODS,
        cyclegan.METHOD,
        recycle_gan.METHOD,
    )
}
