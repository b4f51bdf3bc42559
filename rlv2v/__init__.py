"""Unsupervised few-shot video-to-video translation: the method of RL-V2V-GAN (arXiv:2410.20657).

`rlv2v.PrioritizedReplay` and `rlv2v.kernels.convlstm` serve on their own; the commands are `python -m rlv2v.<command>`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlv2v.replay import PrioritizedReplay

__all__ = ["PrioritizedReplay", "__version__"]
__version__ = "0.1.0"
# Of an image, 16384x8192: OpenCV takes memory by what a header says, however short the file. It reads this when loaded.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import rlv2v` costs nothing."""
    if name == "PrioritizedReplay":
        from rlv2v.replay import PrioritizedReplay

        return PrioritizedReplay
    raise AttributeError(f"module 'rlv2v' has no attribute {name!r}")
