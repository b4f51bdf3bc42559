"""One causal pass over a batch, which gives every term of equations 1-10 for all prefixes in O(T)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlv2v.method.losses import Frames, Logits
from rlv2v.model import Discriminator
from rlv2v.model.build import Nets
from rlv2v.model.frames import map_state
from rlv2v.model.generator import Details


class Rollout(NamedTuple):
    """All that the direction A -> B makes of a batch of clips a; T frames each, but `recycled`."""

    video: Frames  # a
    fake: Frames  # G_B(a): frame t is G_B(a[1:t])_t
    details: Details  # what G_B decided beside it
    pool: Frames | None  # G_B of more clips of A, at which statistics alone look
    same: Frames | None  # G_A(a), for the identity loss
    cycle: Frames | None  # G_A(G_B(a))
    predicted: Frames | None  # P_A(a): frame t is P_A(a[1:t]), the guess of a[t+1]
    recycled: Frames | None  # frame t is G_A([G_B(a[1:t]), P_B(G_B(a[1:t]))])_{t+1}, T-1 of them


def rollouts(
    nets: Nets,
    x: Frames,
    yz: Frames,
    *,
    pool: Frames | None = None,
    same: bool = True,
    back: bool = True,
    predict: bool = True,
) -> tuple[Rollout, Rollout]:
    """Run X -> Y -> X over clips x and Y -> X -> Y over clips y and z, all prefixes at once.

    The recycle loss (eq. 5, 6) appends a predicted frame to each translated prefix. The generator's state after every
    prefix is kept, and all T-1 continuations run as one extra step. A network runs once for all clips that enter it
    at the same stage. `same`, `back` and `predict` leave out what no loss asks for. `pool` are more clips of X, which
    are translated and no more.
    """
    n, m = len(x), len(yz)
    more = () if pool is None else (pool,)
    to_y, details_y, _ = nets.g_y.forward_with_details(torch.cat((x, yz, *more) if same else (x, *more)))
    to_x, details_x, _ = nets.g_x.forward_with_details(torch.cat((yz, x)) if same else yz)
    fake_y, fake_x = to_y[:n], to_x[:m]
    cycle_x = cycle_yz = predicted_x = predicted_yz = recycled_x = recycled_yz = None
    if back:
        cycle_x, states_x = nets.g_x(fake_y, all_states=predict)
        cycle_yz, states_y = nets.g_y(fake_x, all_states=predict)
    if back and predict:
        predicted_x, guess_x = nets.p_x(torch.cat((x, fake_x)))[0].split((n, m))
        predicted_yz, guess_y = nets.p_y(torch.cat((yz, fake_y)))[0].split((m, n))
        recycled_x, _ = nets.g_x(guess_y[:, :-1], map_state(lambda s: s[:, :-1], states_x), one_step_from_each=True)
        recycled_yz, _ = nets.g_y(guess_x[:, :-1], map_state(lambda s: s[:, :-1], states_y), one_step_from_each=True)
    same_yz, same_x = (to_y[n : n + m], to_x[m:]) if same else (None, None)
    return (
        Rollout(
            x,
            fake_y,
            details_y.first(n),
            None if pool is None else to_y[-len(pool) :],
            same_x,
            cycle_x,
            predicted_x,
            recycled_x,
        ),
        Rollout(yz, fake_x, details_x.first(m), None, same_yz, cycle_yz, predicted_yz, recycled_yz),
    )


def discriminate(d: Discriminator, *videos: Frames | None) -> list[Logits]:
    """Return D's logits (B,T,heads) of each group of clips, all prefixes, in one run over the groups together."""
    present = [v for v in videos if v is not None]
    logits = iter(d(torch.cat(present))[0].split([len(v) for v in present]))
    return [None if v is None else next(logits) for v in videos]
