"""ConvLSTM kernels: one function, `convlstm`, over interchangeable backends. Imported as `rlv2v.kernels`."""

from rlv2v.kernels.api import BACKENDS, convlstm, convlstm_cells, explain

__all__ = ["BACKENDS", "convlstm", "convlstm_cells", "explain"]
