"""The ConvLSTM layer of every network, over `rlv2v.kernels`."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from rlv2v.kernels import convlstm_cells
from rlv2v.model.frames import RunMode, State, batch_major, frame_major


class LSTMState(NamedTuple):
    """The state of a ConvLSTM: hidden h and cell c, each (B,C,H,W)."""

    h: Tensor
    c: Tensor


class ConvLSTM(nn.Module):
    """A ConvLSTM layer with kernel size k (odd, same padding); `rlv2v.kernels.convlstm` describes the weights.

    Weights are Xavier-initialised (section 3.4), biases are 0. With a `horizon` T > 2 the biases of the forget and
    input gates start at log u and -log u, with u uniform in [1, T-1]. Then the cells remember over all times up to T
    from the first step on, and can tell the frames of a clip apart (Tallec and Ollivier 2018, arXiv:1804.11188).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, *, horizon: int = 0, backend: str = "auto") -> None:
        super().__init__()
        self.backend, self.recompute = backend, False
        w_x, w_h = (torch.empty(4 * c_out, c, kernel, kernel) for c in (c_in, c_out))
        for weight in (w_x, w_h):
            for gate in weight.chunk(4):
                nn.init.xavier_uniform_(gate)
        # Channels-last like the frames, so that neither the weights nor their gradients are ever reordered.
        self.w_x, self.w_h = (nn.Parameter(w.contiguous(memory_format=torch.channels_last)) for w in (w_x, w_h))
        self.bias = nn.Parameter(torch.zeros(4 * c_out))
        if horizon > 2:
            log_spans = torch.empty(c_out).uniform_(1, horizon - 1).log()
            self.bias.data[:c_out], self.bias.data[c_out : 2 * c_out] = -log_spans, log_spans

    def forward(self, x: Tensor, state: LSTMState | None = None, **mode: Unpack[RunMode]) -> tuple[Tensor, State]:
        cells = partial(convlstm_cells, backend=self.backend, recompute=self.recompute)
        weights = (self.w_x, self.w_h, self.bias)
        if mode.get("one_step_from_each"):
            assert state is not None
            frames, h, c = (frame_major(s) for s in (x, *state))
            hs, _ = cells(frames.unsqueeze(1), *weights, h, c)
            return batch_major(hs.squeeze(1), x), None
        hs, cs = cells(x, *weights, *(state or (None, None)))
        return hs, LSTMState(hs, cs) if mode.get("all_states") else LSTMState(hs[:, -1], cs[:, -1])
