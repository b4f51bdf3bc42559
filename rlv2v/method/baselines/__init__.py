"""The methods that `--method` names: ours, and the baselines that share its loader, budget, evaluation and report.

To add one, write a module with a `METHOD` and list it here.
"""

from __future__ import annotations

from rlv2v.method.baselines.base import Method
from rlv2v.method.baselines.cyclegan import METHOD as CYCLEGAN

METHODS: dict[str, Method] = {
    method.name: method for method in (Method("rlv2v", "RL-V2V-GAN, this project's method"), CYCLEGAN)
}
