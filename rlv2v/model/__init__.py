"""Networks of RL-V2V-GAN, and the blocks they are made of.

`Translator` is G and P, `GridTranslator` G for frames of any size, `Discriminator` D and Q.
"""

from rlv2v.model.blocks import RPB, URB, Residual, limit_history
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.generator import Generator
from rlv2v.model.grid import GridTranslator
from rlv2v.model.networks import Discriminator, Translator
from rlv2v.model.norm import SequenceNorm

__all__ = [
    "RPB",
    "URB",
    "ConvLSTM",
    "Discriminator",
    "Generator",
    "GridTranslator",
    "Residual",
    "SequenceNorm",
    "Translator",
    "limit_history",
]
