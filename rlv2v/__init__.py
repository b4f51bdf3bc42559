"""Unsupervised few-shot video-to-video translation: the method of RL-V2V-GAN (arXiv:2410.20657).

`rlv2v.PrioritizedReplay` and `rlv2v.kernels.convlstm` serve on their own; the commands are `python -m rlv2v.<command>`.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlv2v.replay import PrioritizedReplay

__all__ = ["PrioritizedReplay", "__version__"]
__version__ = "0.1.0"
# Of an image, 16384x8192: OpenCV takes memory by what a header says, however short the file. It reads this when loaded.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**27))


def end_at_once(number: int, _: FrameType | None) -> None:
    """Say in one line that Ctrl-C ended a command that has not begun yet, and end it.

    It raises nothing: what imports torch would print a traceback, and some of it goes on as if nothing had been raised.
    """
    os.write(2, f"rlv2v: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def is_command() -> bool:
    """Return whether Python imports this to run one of its modules, as `python -m rlv2v.train` does."""
    return sys.argv[:1] == ["-m"] and any(word.split(".")[0] == "rlv2v" for word in sys.orig_argv)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)  # until `rlv2v.cli.run_command`, some seconds later


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import rlv2v` costs nothing."""
    if name == "PrioritizedReplay":
        from rlv2v.replay import PrioritizedReplay

        return PrioritizedReplay
    raise AttributeError(f"module 'rlv2v' has no attribute {name!r}")
