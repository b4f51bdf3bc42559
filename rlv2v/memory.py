"""placeholder until the memory branch lands"""

from __future__ import annotations

import torch

from rlv2v.config import Config


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def advise(config: Config, device: torch.device) -> str:
    return "less"
