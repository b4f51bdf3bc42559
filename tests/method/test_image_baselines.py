"""CycleGAN and Recycle-GAN: their losses against a literal form, the pool of images, what a step shows to whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from method_cases import random_clips
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method.baselines import METHODS, cyclegan, recycle_gan
from rlv2v.method.baselines.image_gan import ImageGan, ImagePool, disc_loss
from rlv2v.method.baselines.image_networks import FramePredictor, ImageGenerator, PatchDiscriminator
from rlv2v.method.clips import Clips
from rlv2v.method.memory import advise, count, estimate
from rlv2v.method.translation import translate_chunk
from rlv2v.runtime.memory import CountStorages

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"size": 8, "frames": 4, "widths": (2, 4), "disc_widths": (2, 3), "steps": 20, "replicas": 1}
pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(method: str, **changes: Any) -> Config:
    return Config.of("tiny", method, **SMALL | changes).check()


def random_nets(method: str) -> Any:
    """Networks in float64 with weights far enough from 0 that every loss has a gradient."""
    torch.manual_seed(1)
    nets: Any = METHODS[method].footprint(config_of(method)).nets().double()
    with torch.no_grad():
        for weight in nets.parameters():
            weight.mul_(10.0).add_(0.05 * torch.randn(weight.shape))
    return nets


def random_frames(num: int, length: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(num, length, 3, 16, 16, generator=rng, dtype=torch.float64) * 2 - 1


def mean_abs(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum() / a.numel()


def fooled(logits: Tensor) -> Tensor:
    return ((logits - 1) ** 2).sum() / logits.numel()


def same_gradients(nets: Any, names: tuple[str, ...], ours: Tensor, literal: Tensor) -> None:
    torch.testing.assert_close(ours, literal)
    weights = [p for name in names for p in getattr(nets, name).parameters()]
    for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in (ours, literal)), strict=True):
        torch.testing.assert_close(a, b)


def test_cyclegan_descends_its_equations() -> None:
    """Zhu et al. 2017, eq. 1 (least squares), 2, 3 and section 5.2, one image at a time."""
    nets, x, y = random_nets("cyclegan"), random_frames(2, 1, 1), random_frames(2, 1, 2)
    terms, made = cyclegan.generator_losses(nets, x, y, config_of("cyclegan", cycle=3.0, identity=0.7))
    g_x, g_y = nets.g_x.images, nets.g_y.images
    literal: dict[str, list[Tensor]] = {}
    for a, b in zip(x.unbind(0), y.unbind(0), strict=True):
        for name, value in {
            "g_y": fooled(nets.d_y(g_y(a))),
            "g_x": fooled(nets.d_x(g_x(b))),
            "cycle_x": 3.0 * mean_abs(g_x(g_y(a)), a),
            "cycle_y": 3.0 * mean_abs(g_y(g_x(b)), b),
            "identity_y": 0.7 * mean_abs(g_y(b), b),
            "identity_x": 0.7 * mean_abs(g_x(a), a),
        }.items():
            literal.setdefault(name, []).append(value / 2)
    assert terms.keys() == literal.keys()
    for name, values in literal.items():
        torch.testing.assert_close(terms[name], torch.stack(values).sum(), msg=name)
    total = torch.stack([value for values in literal.values() for value in values]).sum()
    same_gradients(nets, ("g_x", "g_y"), torch.stack(list(terms.values())).sum(), total)
    torch.testing.assert_close(made.disc_y, g_y(x[:, 0]))
    plain = cyclegan.generator_losses(nets, x, y, config_of("cyclegan", cycle=0.0, identity=0.0))[0]
    assert plain.keys() == {"g_y", "g_x"} and torch.equal(plain["g_y"], terms["g_y"])


def test_a_discriminator_descends_half_of_both_squares() -> None:
    nets, real, fake = random_nets("cyclegan"), random_frames(2, 1, 3)[:, 0], random_frames(3, 1, 4)[:, 0]
    d = nets.d_y
    literal = fooled(torch.cat([d(image[None]) for image in real])) / 2
    literal = literal + (torch.cat([d(image[None]) for image in fake]) ** 2).mean() / 2
    same_gradients(nets, ("d_y",), disc_loss(d, real, fake), literal)


def test_recycle_gan_descends_its_equations() -> None:
    """Bansal et al. 2018, eq. 1, 4, 5 in the form of their code, and CycleGAN's terms on the first two frames."""
    nets, x, y = random_nets("recycle-gan"), random_frames(2, 3, 5), random_frames(2, 3, 6)
    config = config_of("recycle-gan", l_tau=2.0, l_rc=3.0, cycle=0.5, identity=0.3)
    terms, made = recycle_gan.generator_losses(nets, x, y, config)
    literal: dict[str, Tensor] = {}
    shown: dict[str, list[Tensor]] = {}
    for a, b, frames in (("x", "y", x), ("y", "x", y)):
        g, back, d = getattr(nets, f"g_{b}").images, getattr(nets, f"g_{a}").images, getattr(nets, f"d_{b}")
        p, p_other = getattr(nets, f"p_{a}"), getattr(nets, f"p_{b}")
        f1, f2, f3 = frames.unbind(1)
        fake = [g(f1), g(f2)]
        fake.append(p_other(*fake))
        literal[f"g_{b}"] = fooled(d(fake[0])) + fooled(d(fake[1])) + fooled(d(fake[2]))
        literal[f"tau_{a}"] = 2.0 * mean_abs(p(f1, f2), f3)
        literal[f"rc_{a}"] = 3.0 * mean_abs(back(fake[2]), f3)
        literal[f"cycle_{a}"] = 0.5 * (mean_abs(back(fake[0]), f1) + mean_abs(back(fake[1]), f2))
        literal[f"identity_{a}"] = 0.3 * (mean_abs(back(f1), f1) + mean_abs(back(f2), f2))
        shown.setdefault(b, []).extend(fake)
        shown.setdefault(a, []).append(p(f1, f2))
    assert terms.keys() == literal.keys()
    for name, value in literal.items():
        torch.testing.assert_close(terms[name], value, msg=name)
    sums = (torch.stack(list(values.values())).sum() for values in (terms, literal))
    same_gradients(nets, ("g_x", "g_y", "p_x", "p_y"), *sums)
    # D_Y sees the three fakes of x and the prediction of y, clip after clip; D descends the sum of four losses.
    *fakes_y, predicted_y = sorted(shown["y"], key=lambda image: any(image is p for p in shown["y"][-1:]))
    by_clip = torch.stack([*fakes_y, predicted_y], 1).flatten(0, 1)
    torch.testing.assert_close(made.disc_y.unflatten(0, (2, 4)).sum(1), by_clip.unflatten(0, (2, 4)).sum(1))
    losses = recycle_gan.discriminator_losses(nets, x, y, made.disc_x.detach(), made.disc_y.detach())
    reals = (y[:, 0], y[:, 1], y[:, 2], y[:, 2])
    by_frame = made.disc_y.detach().unflatten(0, (2, 4)).unbind(1)
    expected = [disc_loss(nets.d_y, real, fake) for real, fake in zip(reals, by_frame, strict=True)]
    torch.testing.assert_close(losses["d_y"], torch.stack(expected).sum())


def test_the_pool_gives_back_half_of_the_images_later() -> None:
    pool, rng = ImagePool(10), np.random.default_rng(0)
    images = torch.arange(4000.0)[:, None, None, None].expand(-1, 3, 2, 2)
    first = pool.query(images[:10], rng)
    assert torch.equal(first, images[:10]), "until it is full, it gives back what it gets"
    given = torch.stack([pool.query(image[None], rng)[0] for image in images[10:]])[:, 0, 0, 0]
    numbers = torch.arange(10.0, 4000.0)
    is_new = given == numbers
    assert 0.47 < is_new.float().mean() < 0.53, "one half of them at once"
    ages = (numbers - given)[~is_new]
    # An image waits until its place is drawn, with probability 1/2 * 1/10 each time: 20 on average.
    assert 18.0 < ages.mean() < 22.0 and ages.min() >= 1
    assert given.unique().numel() == given.numel(), "none comes twice"
    again, other = ImagePool(10), np.random.default_rng(0)
    again.load_state_dict(pool.state_dict())
    rng = np.random.default_rng(0)
    assert torch.equal(again.query(images[:20], rng), pool.query(images[:20], other))


def test_networks_have_the_shapes_and_patches_of_their_papers() -> None:
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    g = ImageGenerator((64, 128, 256))
    assert g.images(x).shape == x.shape and g.multiple == 4
    # 11.4 million weights for nine blocks in Zhu et al.'s code, 7.8 for six
    assert 7.7e6 < sum(p.numel() for p in g.parameters()) < 7.9e6
    assert FramePredictor((4, 8, 16))(x, x).shape == x.shape
    for widths, patch in (((64, 128, 256, 512), 70), ((4, 8, 16), 34), ((4, 8), 16)):
        image = torch.zeros(1, 3, 128, 128, requires_grad=True)
        logits = PatchDiscriminator(widths)(image)
        middle = logits.shape[-1] // 2
        for layer in (d := PatchDiscriminator(widths)).layers:
            if isinstance(layer, torch.nn.InstanceNorm2d):
                layer.forward = lambda values: values  # type: ignore[method-assign]
        d(image)[0, 0, middle, middle].backward()
        rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()  # type: ignore[union-attr]
        assert rows[-1] - rows[0] + 1 == patch


@pytest.mark.parametrize("method", ["cyclegan", "recycle-gan"])
def test_a_step_moves_every_network_and_a_frame_is_translated_by_itself(method: str) -> None:
    config = config_of(method)
    trainer: Any = METHODS[method].trainer(config, CPU, 0, 1)
    old = {name: [p.clone() for p in net.parameters()] for name, net in trainer.nets.named_children()}
    logs = trainer.step(random_clips(dtype=torch.float32))
    trainer.advance(1.0)
    for name, net in trainer.nets.named_children():
        assert not all(torch.equal(a, b) for a, b in zip(net.parameters(), old[name], strict=True)), name
    assert {"loss", "grad", "loss_d", "grad_d", "g_x", "d_y"} <= logs.keys()
    g = trainer.generators.g_y.eval()
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    together, state = translate_chunk(g, config, clip)
    alone = np.concatenate([translate_chunk(g, config, frame[None])[0] for frame in clip])
    assert state is None and np.abs(together.astype(int) - alone).max() <= 1


@pytest.mark.parametrize(("method", "sets"), [("cyclegan", "yzs"), ("recycle-gan", "yz")])
def test_what_a_step_shows(method: str, sets: str) -> None:
    """Neighbouring frames from anywhere in a clip, targets of all sets that have as many; for two replicas or ranks."""
    config = config_of(method, replicas=2, batch_x=1)
    whole: ImageGan = METHODS[method].trainer(config, CPU, 0, 1)  # type: ignore[assignment]

    def numbered(first: int, num: int, length: int = 4) -> Tensor:
        frames = first + 10.0 * torch.arange(num)[:, None] + torch.arange(length)
        return frames[..., None, None, None].expand(-1, -1, 3, 8, 8)

    clips = Clips(numbered(0, 2), numbered(100, 2), numbered(200, 2), numbered(300, 4, 1))
    seen, starts = set(), set()
    for step in range(60):
        rngs = [np.random.default_rng([0, step, 1 + replica]) for replica in range(2)]
        x, y = (frames[:, :, 0, 0, 0] for frames in whole.pick(clips, rngs))
        assert x.shape == y.shape == (2, whole.frames)
        assert (x.diff(dim=1) == 1).all() and (y.diff(dim=1) == 1).all()
        seen |= {"yzs"[int(value) // 100 - 1] for value in y[:, 0]}
        starts |= {int(value) % 10 for value in x[:, 0]}
        for replica in range(2):  # as a rank of its own would draw
            rows = slice(replica, replica + 1), slice(2 * replica, 2 * replica + 2)
            share = Clips(clips.x[rows[0]], clips.y[rows[0]], clips.z[rows[0]], clips.s[rows[1]])  # type: ignore[index]
            own = whole.pick(share, [np.random.default_rng([0, step, 1 + replica])])
            assert torch.equal(own[0][:, :, 0, 0, 0], x[rows[0]]) and torch.equal(own[1][:, :, 0, 0, 0], y[rows[0]])
    assert seen == set(sets) and starts == set(range(4 - whole.frames + 1))


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ("recycle-gan", ["discriminators"]),
        *(
            pytest.param(method, ["generators", "discriminators"], marks=pytest.mark.thorough)
            for method in ("cyclegan", "recycle-gan")
        ),
    ],
)
def test_the_count_is_what_a_real_step_holds(method: str, phases: list[str]) -> None:
    config = config_of(method, size=16)
    for phase in phases:
        counted, real = count(config, phase), count(config, phase, mode=CountStorages)
        assert counted.activations == real.activations > 0, phase
        assert 0.8 * real.peak <= counted.peak <= 1.25 * real.peak, phase


@pytest.mark.thorough
def test_memory_is_estimated_and_advised() -> None:
    config = config_of("cyclegan", size=16)
    needs = estimate(config)
    assert needs.weights == needs.gradients == needs.optimiser / 2
    assert estimate(config.replace(average=0.5)).weights > needs.weights
    assert "; --" in advise(config.replace(batch_x=8), CPU, estimate(config).reserved + 10**6)
