"""One step of RL-V2V-GAN written plainly: the twin beside which rlv2v's `Algorithm` is checked and timed.

Algorithm 1 with this project's additions, as one would write it down from the paper in eager PyTorch. A loss that the
paper writes over prefixes runs its network anew on every prefix; transitions are looped over, each on its own unpadded
prefix; the replay buffer is a deque of tuples; what a step logs is read by `.item()` at once.

It is not slowed down. What a sensible plain program would share is shared: the translated prefixes G_B(a[1:t]) are made
once a step and serve eq. 1, 2, 5, 6, the video losses, the additions, and D afterwards; D's logits of prefixes serve
the video losses; y and z run as one batch; single frames go through D as one batch; D and Q take no weight gradients in
the generators' phase; no candidates are made where the action is a random frame (but for the paper's reward, which
needs them), no target where the video has ended; the unweighted equations of rlv2v's `losses`, the additions and the
schedule are used as they are, being plain PyTorch already. What it does not use is that the networks are causal: that
one run over a clip holds the outputs for all of its prefixes.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, logsigmoid, normalize
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from oracle.plain_nets import Discriminator, GridTranslator, Nets, Translator, plain_weights
from rlv2v.data import to_model, to_uint8
from rlv2v.method import losses
from rlv2v.method.clips import Clips
from rlv2v.method.collector import annealed
from rlv2v.method.schedule import Schedule
from rlv2v.method.step import DISCRIMINATORS, GENERATORS, Algorithm
from rlv2v.method.terms import contrast_loss, inversion, mask_prior, mixing, roughness, rows_of

NUM_PATCHES, NUM_DIRECTIONS = 4096, 16


class Stored(NamedTuple):
    """Hold one transition as the buffer keeps it; the next state is [state, action]."""

    state: Tensor  # uint8 (p,H,W,3)
    action: Tensor  # uint8 (H,W,3)
    reward: float
    terminal: bool


class Transition(NamedTuple):
    """Hold one transition as the networks see it."""

    state: Tensor  # (1,p,3,H,W)
    action: Tensor  # (1,3,H,W)
    reward: Tensor  # ()
    terminal: bool


def append(video: Tensor, frame: Tensor) -> Tensor:
    """Return [video, frame]: (B,p,3,H,W), (B,3,H,W) -> (B,p+1,3,H,W)."""
    return torch.cat((video, frame[:, None]), 1)


def prefixes(video: Tensor, num: int) -> list[Tensor]:
    """Return video[1:t] for t = 1..num."""
    return [video[:, :t] for t in range(1, num + 1)]


def last(net: Translator | GridTranslator | Discriminator, video: Tensor) -> Tensor:
    """Return a network's entry for the last frame of a video."""
    entries: Tensor = net(video)
    return entries[:, -1]


def scores(d: Discriminator, video: Tensor) -> Tensor:
    """Return D's logits of every prefix, (B,T,heads)."""
    return torch.stack([last(d, v) for v in prefixes(video, video.shape[1])], 1)


def singles(video: Tensor, steps: Sequence[int]) -> Tensor:
    """Return the frames `steps` of each clip, each a video of its own: (B,T,3,H,W) -> (B*n,1,3,H,W)."""
    return video[:, steps].flatten(0, 1)[:, None]


def joined(clips: Tensor, more: Tensor | None) -> Tensor:
    """Return clips and more clips as one set."""
    return clips if more is None else torch.cat((clips, more))


def draw_patches(rng: np.random.Generator) -> list[tuple[int, int, np.ndarray, Tensor]]:
    """Return (frames, side, places (2,n,5), directions (features,K)) of each kind of patch."""
    kinds = []
    for frames, side in ((1, 1), (1, 3), (2, 1)):
        places = rng.random((2, 1, NUM_PATCHES, 5), np.float32)[:, 0]
        directions = rng.standard_normal((3 * frames * side**2 + 5, NUM_DIRECTIONS))
        kinds.append((frames, side, places, normalize(torch.from_numpy(directions), dim=0)))
    return kinds


def patch_gap(a: Tensor, b: Tensor, draws: list[tuple[int, int, np.ndarray, Tensor]]) -> Tensor:
    """Return the distance of sorted projections of patches, the mean over kinds."""
    gaps = []
    for frames, side, places, directions in draws:
        ordered = []
        for clips, own in zip((a, b), places, strict=True):

            def pick(number: int, size: np.ndarray, own: np.ndarray = own) -> np.ndarray:
                return np.minimum((own[:, number] * size.astype(np.float32)).astype(int), size - 1)

            windows = clips.unfold(3, side, 1).unfold(4, side, 1)  # (B,T,3,H',W',k,k)
            length = clips.shape[1]
            sizes = np.array([len(clips), length - frames + 1, *windows.shape[3:5]])
            n, t, row, column = (pick(number, size) for number, size in enumerate(sizes))
            gap = 1 + pick(4, length - 1 - t) if frames == 2 else 0 * t
            times = [t, t + gap][:frames]
            chosen = torch.stack([windows[n, at, :, row, column] for at in times], 1).flatten(3)  # (n,f,3,k^2)
            mean = chosen.mean((1, 3), keepdim=True)
            different = (2 / side * (chosen - mean)).flatten(1)
            place = torch.from_numpy(np.stack((3 * ((2 * row + side) / clips.shape[-2] - 1), 2 * gap / length - 1), 1))
            features = torch.cat((different, 1.7 * mean.flatten(1), place.to(clips)), 1)
            ordered.append((features @ directions.to(features)).sort(0).values)
        gaps.append((ordered[0] - ordered[1]).abs().mean())
    return torch.stack(gaps).mean()


class Translated(NamedTuple):
    """Hold what a generator makes of a batch of clips."""

    prefixes: list[Tensor]  # G(v[1:t]) for t = 1..T
    beside: Any  # what the generator decided beside the last of them: its copy mask, or the two parts of its grid
    pool: Tensor | None  # G of the clips at which statistics alone look

    @property
    def video(self) -> Tensor:
        """Return G(v[1:T])."""
        return self.prefixes[-1]

    def singles(self, steps: Sequence[int]) -> Tensor:
        """Return G(v[1:t])_t for the t in `steps`, each a video of its own, in the order of `singles`."""
        return torch.stack([self.prefixes[t][:, -1] for t in steps], 1).flatten(0, 1)[:, None]


class Plain:
    """Take the steps of an `Algorithm` that has been started, from its weights, the plain way."""

    def __init__(self, algorithm: Algorithm) -> None:
        config, device = algorithm.config, algorithm.device
        assert config.runtime.precision == "fp32" and config.runtime.replicas == 1 and config.rl.replay_alpha == 0
        self.config, self.device = config, device
        weight = next(algorithm.nets.parameters())
        self.dtype = weight.dtype
        self.nets = Nets(config).to(device, self.dtype)
        self.targets = copy.deepcopy(self.nets).requires_grad_(False)
        self.average = nn.ModuleDict({name: copy.deepcopy(getattr(self.nets, name)) for name in ("g_x", "g_y")})
        self.load(algorithm)
        self.schedule = Schedule(config, device)
        self.buffers: dict[str, deque[Stored]] = {domain: deque(maxlen=config.rl.replay_capacity) for domain in "xy"}
        self.num_stored = dict.fromkeys("xy", 0)

        def adam(names: Sequence[str], lr: float) -> AdamW:
            weights = [p for name in names for p in getattr(self.nets, name).parameters()]
            return AdamW(weights, lr, config.optim.betas, weight_decay=config.optim.weight_decay)

        self.rates = {
            "generators": config.optim.lr,
            "discriminators": config.optim.disc_lr,
            "x": config.optim.disc_lr,
            "y": config.optim.disc_lr,
        }
        named = {"generators": GENERATORS, "discriminators": DISCRIMINATORS, "x": ("q_x",), "y": ("q_y",)}
        self.optimisers = {name: adam(named[name], rate) for name, rate in self.rates.items()}

    def load(self, algorithm: Algorithm) -> None:
        """Copy the weights of networks, targets and averages."""
        for name in ("nets", "targets", "average"):
            getattr(self, name).load_state_dict(plain_weights(getattr(algorithm, name).state_dict()))

    def step(self, clips: Clips, ids: Sequence[int] = ()) -> dict[str, float]:
        """Take one step of Algorithm 1, with the draws of `Algorithm.step`, from (seed, step) and (seed, step, 1).

        ids: of the stored transitions that are drawn, counted from the first one ever stored in the domain's buffer.
        They are passed in because the buffers' random numbers differ; to draw them would take microseconds.
        """
        config, schedule = self.config, self.schedule
        rng = np.random.default_rng([config.seed, schedule.step])
        length = clips.x.shape[1]
        steps = sorted(rng.permutation(length)[: min(config.loss.disc_frames or length, length)].tolist())
        self.patch_draws = draw_patches(rng)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self.rates[name] * schedule.lr_factor
        logs: dict[str, float] = {}
        domain, batch = None, list[Transition]()
        if config.rl.enabled and schedule.step % config.rl.every == 0:
            domain = "xy"[schedule.step // config.rl.every % 2]
            batch = self.collect(domain, clips, ids)
            logs |= self.critic(domain, batch)
        more, fake_y, fake_x = self.generators(clips, steps, domain, batch)
        self.patches = {name: value for name, value in more.items() if name.startswith("patches")}
        return logs | more | self.discriminators(clips, fake_y, fake_x, steps)

    def advance(self, seconds: float) -> None:
        """End a step."""
        weight = self.config.loss.term("patches")
        self.schedule.advance(seconds, torch.tensor(sum(self.patches.values()) / weight) if self.patches else None)

    def descend(self, name: str, loss: Tensor, limit: float) -> float:
        """Take one step of an optimiser; return the norm of the gradient without clipping."""
        optimiser: Optimizer = self.optimisers[name]
        optimiser.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(optimiser.param_groups[0]["params"], limit or float("inf"))
        optimiser.step()
        return norm.item()

    # M = m transitions of one clip v: stored with probability eta1, else new           (Algorithm 1, inner loop)
    @torch.no_grad()
    def collect(self, domain: str, clips: Clips, ids: Sequence[int]) -> list[Transition]:
        config, progress, buffer = self.config, self.schedule.progress, self.buffers[domain]
        rng = np.random.default_rng([config.seed, self.schedule.step, 1])
        sets = {name: clips_of_set for name in "xyz" if (clips_of_set := getattr(clips, name)) is not None}
        own = "x" if domain == "x" else "yz"
        videos = [(name, video) for name in own if name in sets for video in sets[name]]
        name, video = videos[rng.integers(len(videos))]
        data = [frame for clips_of_set in sets.values() for each in clips_of_set for frame in each]
        heads = 1 if name == "y" else None
        num = config.rl.transitions
        recalled = int((rng.random(num) < annealed(*config.rl.eta1, progress)).sum()) if buffer else 0
        assert recalled == len(ids), "the twin and the algorithm recall as many transitions"
        batch = []
        if recalled < num:
            length, fresh = len(video), num - recalled
            ends, frames = rng.integers(1, length, fresh), rng.integers(0, len(data), fresh)
            greedy = rng.random(fresh) < annealed(*config.rl.eta2, progress)
            draws = zip(ends.tolist(), frames.tolist(), greedy.tolist(), strict=True)
            batch = [self.act(domain, video, p, data[frame], is_greedy, heads) for p, frame, is_greedy in draws]
        # The oldest id that the buffer still holds comes first in it.
        oldest = self.num_stored[domain] - len(buffer)
        stored = [buffer[number - oldest] for number in ids]
        for new in batch:
            action, state = to_uint8(new.action)[0], to_uint8(new.state)[0]
            buffer.append(Stored(state, action, new.reward.item(), new.terminal))
        self.num_stored[domain] += len(batch)
        return batch + [self.recall(transition) for transition in stored]

    def recall(self, stored: Stored) -> Transition:
        """Return a stored transition as the networks see it."""
        state, action = (to_model(frames)[None].to(self.dtype) for frames in (stored.state, stored.action))
        reward = torch.tensor(stored.reward, dtype=torch.float32, device=self.device)
        return Transition(state, action, reward.to(self.dtype), stored.terminal)

    def candidates(self, nets: Nets, domain: str, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return a1 = P(s) and a2 = G'([G(s), P'(G(s))])_last."""
        other = {"x": "y", "y": "x"}[domain]
        fakes = getattr(nets, f"g_{other}")(state)
        guess = last(getattr(nets, f"p_{other}"), fakes)
        a1, a2 = last(getattr(nets, f"p_{domain}"), state), last(getattr(nets, f"g_{domain}"), append(fakes, guess))
        return a1, a2

    def act(
        self, domain: str, video: Tensor, p: int, random_frame: Tensor, greedy: bool, heads: int | None
    ) -> Transition:
        """Return a new transition: the critic's choice of a1, a2, or a random frame; and its reward."""
        config, state = self.config, video[None, :p]
        true_frame, terminal = video[None, p], p == len(video) - 1
        q, d = getattr(self.nets, f"q_{domain}"), getattr(self.nets, f"d_{domain}")
        action = random_frame[None]
        first = second = action
        if greedy or config.rl.reward == "paper":
            first, second = self.candidates(self.nets, domain, state)
        if greedy:
            better = last(q, append(state, first)).item() >= last(q, append(state, second)).item()
            action = first if better else second
        # D's score of the video counts at its end alone.
        video_logits = last(d, append(state, action))[:, :heads] if terminal else None
        if config.rl.reward == "transition":
            reward = logsigmoid(last(d, action[:, None])[:, :heads]).mean()
            reward = reward - config.rl.reward_distance * (action - true_frame).abs().mean()
            if video_logits is not None:
                reward = reward + config.loss.l_v * logsigmoid(video_logits).mean()
        elif video_logits is not None:
            reward = -config.loss.l_v * logsigmoid(-video_logits).mean()
        else:
            l_tau, l_rc = ((a - true_frame).square().mean() for a in (first, second))
            reward = -logsigmoid(-last(d, second[:, None])[:, :heads]).mean()
            reward = reward - config.loss.l_tau * l_tau - config.loss.l_rc * l_rc
        return Transition(state, action, reward, terminal)

    # Critic: minimise mean (y - Q(s, a))^2,  y = r + gamma Q'(s', pi'(s'))                        (section 3.3)
    def critic(self, domain: str, batch: list[Transition]) -> dict[str, float]:
        q, q_target = getattr(self.nets, f"q_{domain}"), getattr(self.targets, f"q_{domain}")
        errors = []
        for transition in batch:
            next_state, y = append(transition.state, transition.action), transition.reward
            if not transition.terminal:
                with torch.no_grad():
                    actions = self.candidates(self.targets, domain, next_state)
                    values = [last(q_target, append(next_state, a))[0, 0] for a in actions]
                    y = y + self.config.rl.gamma * torch.maximum(*values)
            errors.append(y - last(q, next_state)[0, 0])
        loss = torch.stack(errors).square().mean()
        reward = torch.stack([transition.reward for transition in batch]).mean()
        grad = self.descend(domain, loss, 0.0)
        return {f"loss_q_{domain}": loss.item(), f"reward_{domain}": reward.item(), f"grad_q_{domain}": grad}

    def actor(self, domain: str, batch: list[Transition]) -> Tensor:
        """Return -J = -mean Q(s, pi(s)) over both candidates."""
        q = getattr(self.nets, f"q_{domain}")
        values = [
            last(q, append(transition.state, action))
            for transition in batch
            for action in self.candidates(self.nets, domain, transition.state)
        ]
        return -torch.stack(values).mean()

    # G and P descend L (eq. 10) and climb J; then the targets follow                              (section 3.3)
    def generators(
        self, clips: Clips, steps: Sequence[int], domain: str | None, batch: list[Transition]
    ) -> tuple[dict[str, float], Translated, Translated]:
        config, nets, schedule = self.config, self.nets, self.schedule
        ramp = schedule.ramp.item() if config.loss.term("mask_prior") else 0.0
        for g in (nets.g_x, nets.g_y):
            if isinstance(g, Translator):
                g.mask_gain.fill_(ramp)
        frozen = (nets.d_x, nets.d_y, nets.q_x, nets.q_y)
        for net in frozen:
            net.requires_grad_(False)
        terms, fake_y, fake_x = self.terms(clips, steps)
        if domain:
            terms[f"actor_{domain}"] = config.rl.weight * self.actor(domain, batch)
        loss = torch.stack(list(terms.values())).sum()
        logs = {name: term.item() for name, term in terms.items()} | {"loss": loss.item()}
        logs["grad"] = self.descend("generators", loss, config.optim.clip_grad)
        for net in frozen:
            net.requires_grad_(True)
        for name in (*GENERATORS, f"q_{domain}") if domain else ():
            follow(getattr(self.targets, name), getattr(nets, name), config.rl.tau)
        for name, average in self.average.items() if config.optim.average else ():
            follow(average, getattr(nets, name), 1.0 - config.optim.average)
        return logs, fake_y, fake_x

    def terms(self, clips: Clips, steps: Sequence[int]) -> tuple[dict[str, Tensor], Translated, Translated]:
        """Return the weighted terms of eq. 10 that G and P descend, and the translations of x and of y, z."""
        config, nets, gain = self.config, self.nets, self.schedule.gain
        score = losses.generator_score(config.loss.gan)
        x, yz, s = clips.x, clips.yz, clips.s
        fake_y, fake_x = self.translate(nets.g_y, x, clips.pool_x), self.translate(nets.g_x, yz)
        terms = {
            "g_y": config.loss.l_adv * losses.l_g_y(score, fakes=nets.d_y(fake_y.singles(steps))),
            "g_x": config.loss.l_adv * losses.l_g_x(score, fakes_y=nets.d_x(fake_x.singles(steps))),
        }
        if config.loss.l_v:
            terms["v_y"] = config.loss.l_v * losses.l_v_y(score, fakes=scores(nets.d_y, fake_y.video))
            terms["v_x"] = config.loss.l_v * losses.l_v_x(score, fakes_y=scores(nets.d_x, fake_x.video))
        ways = (
            ("x", x, fake_y, nets.g_x, nets.p_x, nets.p_y, 1.0),
            ("y", yz, fake_x, nets.g_y, nets.p_y, nets.p_x, 2.0),
        )
        for name, video, fake, g_back, p_own, p_other, twice in ways:
            if config.loss.l_tau:  # eq. 3, 4
                predicted = torch.stack([last(p_own, v) for v in prefixes(video, video.shape[1] - 1)], 1)
                distance = losses.DISTANCES[config.loss.distance](predicted, video[:, 1:])
                terms[f"tau_{name}"] = config.loss.l_tau * distance
            if config.loss.l_rc:  # eq. 5, 6
                recycled = [last(g_back, append(v, last(p_other, v))) for v in fake.prefixes[:-1]]
                distance = losses.l_rc(video, torch.stack(recycled, 1), config.loss.distance)
                terms[f"rc_{name}"] = config.loss.l_rc * distance
            if config.loss.term("cycle"):
                terms[f"cycle_{name}"] = config.loss.term("cycle") * l1_loss(g_back(fake.video), video)
            if config.loss.term("identity") and (like_x := {"x": x, "y": clips.z}[name]) is not None:
                domain = "x" if name == "x" else "z"
                terms[f"identity_{domain}"] = config.loss.term("identity") * l1_loss(g_back(like_x), like_x)
            if config.loss.term("contrast"):
                contrast = contrast_loss(video, fake.video).mean()
                terms[f"contrast_{name}"] = twice * gain * config.loss.term("contrast") * contrast
            if config.loss.term("mask_prior") and isinstance(fake.beside, Tensor):
                terms[f"mask_prior_{name}"] = gain * config.loss.term("mask_prior") * mask_prior(fake.beside)
            if config.loss.term("smoothness") and isinstance(fake.beside, tuple):
                terms[f"smoothness_{name}"] = config.loss.term("smoothness") * roughness(*fake.beside).mean()
            if config.loss.term("order") and isinstance(fake.beside, tuple):
                terms[f"order_{name}"] = config.loss.term("order") * inversion(rows_of(*fake.beside)).mean()
            if config.loss.term("hue") and isinstance(fake.beside, tuple):
                terms[f"hue_{name}"] = config.loss.term("hue") * mixing(rows_of(*fake.beside)).mean()
        if config.loss.term("patches"):
            real_y, real_x = joined(yz, clips.pool_yz), joined(x, clips.pool_x)
            gap = patch_gap(joined(fake_y.video, fake_y.pool), real_y, self.patch_draws)
            terms["patches_y"] = config.loss.term("patches") * gap
            terms["patches_x"] = config.loss.term("patches") * patch_gap(fake_x.video, real_x, self.patch_draws)
        if config.loss.term("identity") and s is not None:
            terms["identity_s"] = config.loss.term("identity") * l1_loss(nets.g_y(s), s)
        return terms, fake_y, fake_x

    def translate(self, g: Translator | GridTranslator, video: Tensor, pool: Tensor | None = None) -> Translated:
        """Run G on every prefix, and on whole clips of the pool."""
        outputs = [g.run(v) for v in prefixes(video, video.shape[1])]
        translations = [output for output, _ in outputs]
        return Translated(translations, outputs[-1][1], None if pool is None else g(pool))

    # D ascends L_g + l_v L_v on real and generated clips                                (Algorithm 1, last lines)
    def discriminators(
        self, clips: Clips, fake_y: Translated, fake_x: Translated, steps: Sequence[int]
    ) -> dict[str, float]:
        config, d_x, d_y = self.config, self.nets.d_x, self.nets.d_y
        score, num_y = losses.discriminator_score(config.loss.gan), len(clips.y)

        def split(logits: Tensor, clips_of_y: int) -> tuple[Tensor, Tensor | None]:
            """Return the logits of y, and of z."""
            return logits[:clips_of_y], None if clips.z is None else logits[clips_of_y:]

        y, z = split(scores(d_y, clips.yz), num_y)
        frames_y, frames_z = split(d_y(singles(clips.yz, steps)), num_y * len(steps))
        x = scores(d_x, clips.x)
        l_g_y = losses.l_g_y(
            score,
            frames_y=frames_y,
            frames_z=frames_z,
            stills=None if clips.s is None else d_y(clips.s),
            prefixes_y=y,
            prefixes_z=z,
            fakes=d_y(fake_y.singles(steps).detach()),
        )
        frames_x, fakes_x = d_x(singles(clips.x, steps)), d_x(fake_x.singles(steps).detach())
        l_g_x = losses.l_g_x(score, frames=frames_x, prefixes=x, fakes_y=fakes_x)
        terms = {"d_g_y": -config.loss.l_adv * l_g_y, "d_g_x": -config.loss.l_adv * l_g_x}
        if config.loss.l_v:
            video_z = None if z is None else z[:, -1]
            fakes = scores(d_y, fake_y.video.detach())
            terms["d_v_y"] = -config.loss.l_v * losses.l_v_y(score, video_y=y[:, -1], video_z=video_z, fakes=fakes)
            fakes = scores(d_x, fake_x.video.detach())
            terms["d_v_x"] = -config.loss.l_v * losses.l_v_x(score, video=x[:, -1], fakes_y=fakes)
        loss = torch.stack(list(terms.values())).sum()
        logs = {name: term.item() for name, term in terms.items()} | {"loss_d": loss.item()}
        return logs | {"grad_d": self.descend("discriminators", loss, config.optim.clip_grad)}


@torch.no_grad()
def follow(target: nn.Module, source: nn.Module, tau: float) -> None:
    """Move theta' <- (1 - tau) theta' + tau theta, and copy buffers."""
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.lerp_(theirs, tau)
    for buffer, new in zip(target.buffers(), source.buffers(), strict=True):
        buffer.copy_(new)
