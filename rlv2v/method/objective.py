"""The objective of eq. 10 from both sides: what G and P descend, and what D ascends, with the added terms."""

from __future__ import annotations

from torch import Tensor

from rlv2v.config import Config
from rlv2v.method import losses
from rlv2v.method.clips import Clips
from rlv2v.method.patches import Draws
from rlv2v.method.rollout import Rollout, discriminate, rollouts
from rlv2v.method.terms import TERMS, TermInputs
from rlv2v.model import Discriminator
from rlv2v.model.build import Nets


def single_frames(video: Tensor, indices: Tensor) -> Tensor:
    """Return the frames `indices` (n,) of each clip, each as a video: (B,T,3,H,W) -> (B*n,1,3,H,W)."""
    return video[:, indices].flatten(0, 1).unsqueeze(1)


def score_fakes(d: Discriminator, fake: Tensor, real: tuple[Tensor | None, ...], indices: Tensor | None) -> Tensor:
    """Return D's logits of generated clips, or of their single frames `indices`, run together with real ones.

    The real clips are for a D that normalises over its mini-batch. Statistics of fakes alone would take away the very
    level of colour by which D recognises them.
    """
    videos = [v if indices is None else single_frames(v, indices) for v in (fake, *real) if v is not None]
    logits = discriminate(d, *videos)[0]
    assert logits is not None
    return logits


def generator_losses(
    nets: Nets, clips: Clips, config: Config, gain: float | Tensor, indices: Tensor, draws: Draws
) -> tuple[dict[str, Tensor], Rollout, Rollout]:
    """Return the weighted terms of eq. 10 that G and P descend, by name, and the two rollouts that they came from.

    gain (): factor on the added terms that are ramped. indices (n,): the frames that D sees one by one. draws: of the
    added terms. A term of weight 0 is not computed.
    """
    weights = config.loss
    added = [(term, weights.term(name)) for name, term in TERMS.items() if weights.term(name)]
    needs = {part for term, _ in added for part in term.needs}
    predict = weights.l_tau > 0 or weights.l_rc > 0
    of_x, of_yz = rollouts(
        nets,
        clips.x,
        clips.yz,
        pool=clips.pool_x,
        same="same" in needs,
        back=predict or "back" in needs,
        predict=predict,
    )
    score = losses.generator_score(weights.gan)
    terms: dict[str, Tensor] = {}

    # eq. 1, 2: frames, and eq. 8, 9: videos; real samples do not depend on G
    real_y, real_x = ((clips.y, clips.z), (clips.x,)) if config.model.disc_norm == "batch" else ((), ())
    l_adv, l_v = weights.l_adv, weights.l_v
    terms["g_y"] = l_adv * losses.l_g_y(score, fakes=score_fakes(nets.d_y, of_x.fake, real_y, indices))
    terms["g_x"] = l_adv * losses.l_g_x(score, fakes_y=score_fakes(nets.d_x, of_yz.fake, real_x, indices))
    if weights.l_v:
        terms["v_y"] = l_v * losses.l_v_y(score, fakes=score_fakes(nets.d_y, of_x.fake, real_y, None))
        terms["v_x"] = l_v * losses.l_v_x(score, fakes_y=score_fakes(nets.d_x, of_yz.fake, real_x, None))

    for name, rollout in (("x", of_x), ("y", of_yz)):
        if weights.l_tau:  # eq. 3, 4
            assert rollout.predicted is not None
            terms[f"tau_{name}"] = weights.l_tau * losses.l_tau(rollout.video, rollout.predicted, weights.distance)
        if weights.l_rc:  # eq. 5, 6
            assert rollout.recycled is not None
            terms[f"rc_{name}"] = weights.l_rc * losses.l_rc(rollout.video, rollout.recycled, weights.distance)

    inputs = TermInputs(nets, clips, of_x, of_yz, draws)
    for term, weight in added:
        factor = gain * weight if term.ramped else weight
        for suffix, value in term.compute(inputs):
            terms[f"{term.name}_{suffix}"] = factor * value
    return terms, of_x, of_yz


def discriminator_losses(
    nets: Nets, clips: Clips, fake_y: Tensor, fake_x: Tensor, config: Config, indices: Tensor
) -> dict[str, Tensor]:
    """Return what D descends, by name: -(L_g + l_v L_v) (Algorithm 1's last lines; eq. 1, 2, 8, 9).

    The fakes carry no gradient.  indices (n,): the frames that D sees one by one.
    """
    score = losses.discriminator_score(config.loss.gan)

    def frames(video: Tensor | None) -> Tensor | None:
        return None if video is None else single_frames(video, indices)

    def last(logits: Tensor | None) -> Tensor | None:
        return None if logits is None else logits[:, -1]

    y, z, prefixes_fake_y = discriminate(nets.d_y, clips.y, clips.z, fake_y)
    frames_y, frames_z, stills, fakes_y = discriminate(
        nets.d_y, frames(clips.y), frames(clips.z), clips.s, frames(fake_y)
    )
    x, prefixes_fake_x = discriminate(nets.d_x, clips.x, fake_x)
    frames_x, fakes_x = discriminate(nets.d_x, frames(clips.x), frames(fake_x))
    l_g_y = losses.l_g_y(
        score, frames_y=frames_y, frames_z=frames_z, stills=stills, prefixes_y=y, prefixes_z=z, fakes=fakes_y
    )
    l_g_x = losses.l_g_x(score, frames=frames_x, prefixes=x, fakes_y=fakes_x)
    terms = {"d_g_y": -config.loss.l_adv * l_g_y, "d_g_x": -config.loss.l_adv * l_g_x}
    if config.loss.l_v:
        l_v_y = losses.l_v_y(score, video_y=last(y), video_z=last(z), fakes=prefixes_fake_y)
        l_v_x = losses.l_v_x(score, video=last(x), fakes_y=prefixes_fake_x)
        terms |= {"d_v_y": -config.loss.l_v * l_v_y, "d_v_x": -config.loss.l_v * l_v_x}
    return terms
