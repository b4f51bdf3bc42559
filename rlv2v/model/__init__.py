"""Networks of RL-V2V-GAN: `Translator` (G, P) and `Judge` (D, Q), over the blocks in `layers`."""

from rlv2v.model.layers import RPB, URB, ConvLSTM, Residual, SequenceNorm, limit_memory
from rlv2v.model.networks import Judge, Translator

__all__ = ["RPB", "URB", "ConvLSTM", "Judge", "Residual", "SequenceNorm", "Translator", "limit_memory"]
