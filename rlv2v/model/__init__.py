"""Networks of RL-V2V-GAN: `Translator` (G and P) and `Discriminator` (D and Q), and the blocks they are made of."""

from rlv2v.model.blocks import RPB, URB, Residual, limit_history
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.generator import Generator
from rlv2v.model.networks import Discriminator, Translator
from rlv2v.model.norm import SequenceNorm

__all__ = [
    "RPB",
    "URB",
    "ConvLSTM",
    "Discriminator",
    "Generator",
    "Residual",
    "SequenceNorm",
    "Translator",
    "limit_history",
]
