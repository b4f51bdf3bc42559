"""Networks of RL-V2V-GAN: `Translator` (G, P) and `Discriminator` (D, Q), over the blocks in `layers`."""

from rlv2v.model.blocks import RPB, URB, Residual, limit_memory
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.networks import Discriminator, Translator
from rlv2v.model.norm import SequenceNorm

__all__ = ["RPB", "URB", "ConvLSTM", "Discriminator", "Residual", "SequenceNorm", "Translator", "limit_memory"]
