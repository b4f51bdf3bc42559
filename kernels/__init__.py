"""ConvLSTM kernels: one function, `convlstm`, over interchangeable backends. Imported as `rlv2v.kernels`."""

from rlv2v.kernels.api import convlstm, convlstm_cells, explain
from rlv2v.kernels.dispatch import BACKENDS

__all__ = ["BACKENDS", "convlstm", "convlstm_cells", "explain"]
