"""The objective of eq. 10 as each side sees it: what G and P descend, and what D ascends, with the additions' terms."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import l1_loss

from rlv2v.config import Config
from rlv2v.method import losses
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.rollout import Rollout, discriminate, rollouts
from rlv2v.method.terms import contrast_loss, domain_gap, mask_prior
from rlv2v.model import Discriminator
from rlv2v.model.build import Nets


def single_frames(video: Tensor, at: Tensor) -> Tensor:
    """The frames `at` (n,) of each clip, each a video of its own: (B,T,3,H,W) -> (B*n,1,3,H,W)."""
    return video[:, at].flatten(0, 1).unsqueeze(1)


def score_fakes(d: Discriminator, fake: Tensor, real: tuple[Tensor | None, ...], at: Tensor | None = None) -> Tensor:
    """D's logits of generated clips, or of their single frames `at`, run together with real ones.

    Real clips are there for the statistics of a D that normalises over its mini-batch: over fakes alone they would
    take away the very level of colour that D tells them by.
    """
    videos = [v if at is None else single_frames(v, at) for v in (fake, *real) if v is not None]
    logits = discriminate(d, *videos)[0]
    assert logits is not None
    return logits


def generator_losses(
    nets: Nets, clips: Clips, config: Config, gains: Gains, at: Tensor, directions: Tensor
) -> tuple[dict[str, Tensor], Rollout, Rollout]:
    """The weighted terms of eq. 10 that G and P descend, by name, and the rollouts they came from.

    `at` (n,): which frames D judges singly; `directions` (3,K): of `domain_gap`. A term of weight 0 is not computed.
    """
    predict = config.l_tau > 0 or config.l_rc > 0
    out, back = rollouts(
        nets, clips.x, clips.yz, same=config.identity > 0, back=predict or config.cycle > 0, predict=predict
    )
    score = losses.generator_score(config.gan)
    terms: dict[str, Tensor] = {}

    # eq. 1, 2: frames, and eq. 8, 9: videos; real samples do not depend on G
    real_y, real_x = ((clips.y, clips.z), (clips.x,)) if config.disc_norm == "batch" else ((), ())
    terms["g_y"] = losses.l_g_y(score, fakes=score_fakes(nets.d_y, out.fake, real_y, at))
    terms["g_x"] = losses.l_g_x(score, fakes_y=score_fakes(nets.d_x, back.fake, real_x, at))
    if config.l_v:
        terms["v_y"] = losses.l_v_y(score, fake=score_fakes(nets.d_y, out.fake, real_y)[:, -1])
        terms["v_x"] = losses.l_v_x(score, fake_y=score_fakes(nets.d_x, back.fake, real_x)[:, -1])
    weights = {"g_y": config.l_adv, "g_x": config.l_adv, "v_y": config.l_v, "v_x": config.l_v}
    terms = {name: gains.adversarial * weights[name] * term for name, term in terms.items()}

    for name, r in (("x", out), ("y", back)):
        if config.l_tau:  # eq. 3, 4
            assert r.predicted is not None
            terms[f"tau_{name}"] = config.l_tau * losses.l_tau(r.video, r.predicted, config.distance)
        if config.l_rc:  # eq. 5, 6
            assert r.recycled is not None
            terms[f"rc_{name}"] = config.l_rc * losses.l_rc(r.video, r.recycled, config.distance)
        if config.cycle:
            assert r.cycle is not None
            terms[f"cycle_{name}"] = config.cycle * l1_loss(r.cycle, r.video)
        if config.identity:
            assert r.same is not None
            terms[f"identity_{name}"] = config.identity * l1_loss(r.same, r.video)
        if config.contrast:
            twice = 1.0 if r is out else 2.0
            terms[f"contrast_{name}"] = twice * gains.content * config.contrast * contrast_loss(r.video, r.fake)
        if config.mask_prior and r.mask is not None:
            terms[f"mask_{name}"] = gains.content * config.mask_prior * mask_prior(r.mask)
    if config.colours:
        terms["colours_y"] = config.colours * domain_gap(out.fake, clips.yz, directions)
        terms["colours_x"] = config.colours * domain_gap(back.fake, clips.x, directions)
    if config.identity and clips.s is not None:
        terms["identity_s"] = config.identity * l1_loss(nets.g_y(clips.s)[0], clips.s)
    return terms, out, back


def discriminator_losses(
    nets: Nets, clips: Clips, fake_y: Tensor, fake_x: Tensor, config: Config, at: Tensor
) -> dict[str, Tensor]:
    """What D descends, by name: -(L_g + l_v L_v) (Algorithm 1's last lines; eq. 1, 2, 8, 9); fakes without gradient."""
    score = losses.discriminator_score(config.gan)

    def frames(video: Tensor | None) -> Tensor | None:
        return None if video is None else single_frames(video, at)

    def last(logits: Tensor | None) -> Tensor | None:
        return None if logits is None else logits[:, -1]

    y, z, video_fake_y = discriminate(nets.d_y, clips.y, clips.z, fake_y)
    frames_y, frames_z, stills, fakes_y = discriminate(
        nets.d_y, frames(clips.y), frames(clips.z), clips.s, frames(fake_y)
    )
    x, video_fake_x = discriminate(nets.d_x, clips.x, fake_x)
    frames_x, fakes_x = discriminate(nets.d_x, frames(clips.x), frames(fake_x))
    l_g_y = losses.l_g_y(
        score, frames_y=frames_y, frames_z=frames_z, stills=stills, prefixes_y=y, prefixes_z=z, fakes=fakes_y
    )
    l_g_x = losses.l_g_x(score, frames=frames_x, prefixes=x, fakes_y=fakes_x)
    terms = {"d_g_y": -config.l_adv * l_g_y, "d_g_x": -config.l_adv * l_g_x}
    if config.l_v:
        l_v_y = losses.l_v_y(score, video_y=last(y), video_z=last(z), fake=last(video_fake_y))
        l_v_x = losses.l_v_x(score, video=last(x), fake_y=last(video_fake_x))
        terms |= {"d_v_y": -config.l_v * l_v_y, "d_v_x": -config.l_v * l_v_x}
    return terms
