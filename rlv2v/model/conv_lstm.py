"""The ConvLSTM layer of every network, over `rlv2v.kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlv2v.kernels import convlstm_cells
from rlv2v.model.frames import State, batch_major, frame_major


class Memory(NamedTuple):
    """State of a ConvLSTM: hidden h and cell c, each (B,C,H,W)."""

    h: Tensor
    c: Tensor


class ConvLSTM(nn.Module):
    """ConvLSTM layer, kernel size k (odd, same padding); weights as `rlv2v.kernels.convlstm` takes them.

    Xavier-initialised (section 3.4), biases 0. With a `horizon` T > 2 the biases of the forget and input gates start at
    log u and -log u, u uniform in [1, T-1], so that the cells remember over all times up to T (Tallec and Ollivier
    2018, arXiv:1804.11188): from the first step on there is something to tell the frames of a clip apart by.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, *, horizon: int = 0, backend: str = "auto") -> None:
        super().__init__()
        self.backend, self.recompute = backend, False
        w_x, w_h = (torch.empty(4 * c_out, c, kernel, kernel) for c in (c_in, c_out))
        for weight in (w_x, w_h):
            for gate in weight.chunk(4):
                nn.init.xavier_uniform_(gate)
        # Channels-last in memory, as the frames: then neither they nor their gradients are ever reordered.
        self.w_x, self.w_h = (
            nn.Parameter(weight.contiguous(memory_format=torch.channels_last)) for weight in (w_x, w_h)
        )
        self.bias = nn.Parameter(torch.zeros(4 * c_out))
        if horizon > 2:
            spans = torch.empty(c_out).uniform_(1, horizon - 1).log()
            self.bias.data[:c_out], self.bias.data[c_out : 2 * c_out] = -spans, spans

    def forward(
        self, x: Tensor, state: Memory | None = None, *, all_states: bool = False, one_step_from_each: bool = False
    ) -> tuple[Tensor, State]:
        weights = (self.w_x, self.w_h, self.bias)
        how: Any = {"backend": self.backend, "recompute": self.recompute}
        if one_step_from_each:
            assert state is not None
            frames, h, c = (frame_major(s) for s in (x, *state))
            hs, _ = convlstm_cells(frames.unsqueeze(1), *weights, h, c, **how)
            return batch_major(hs.squeeze(1), x), None
        hs, cs = convlstm_cells(x, *weights, *(state or (None, None)), **how)
        return hs, Memory(hs, cs) if all_states else Memory(hs[:, -1], cs[:, -1])
