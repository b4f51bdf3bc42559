"""The networks of the image baselines: CycleGAN's generator and discriminator, pix2pix' U-Net as a predictor.

Sources: Zhu et al. 2017, arXiv:1703.10593, section 4 and appendix 7.2; Johnson et al. 2016, arXiv:1603.08155; Isola et
al. 2017, arXiv:1611.07004, appendix 6.1. All normalise by `InstanceNorm2d` without weights, as CycleGAN's code does,
and start from N(0, 0.02) (Zhu et al., section 7.1). A convolution before a norm has no bias: the norm would take it
away, and Adam would walk it at random, by rounding errors. Images are (N,3,H,W) in [-1,1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlv2v.model.frames import State
from rlv2v.model.generator import Generator

NUM_RESIDUAL = 6  # of images up to 128x128 (Zhu et al. 2017, section 4)
SLOPE = 0.2  # of every LeakyReLU
SPREAD = 0.02  # standard deviation of a convolution's first weights


def initialised(layers: Iterable[nn.Module]) -> nn.Sequential:
    """Return layers in a row, with weights from N(0, 0.02) and biases 0."""
    net = nn.Sequential(*layers)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0.0, SPREAD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


class ResidualBlock(nn.Module):
    """x + (3x3 convolution, norm, ReLU, 3x3 convolution, norm)(x), with reflected edges (Zhu et al. 2017, `Rk`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return as many images of as many channels."""
        return x + self.layers(x)


class ImageGenerator(Generator):
    """A ResNet that translates each frame by itself: c7s1-k, d2k, d4k, six R4k, u2k, uk, c7s1-3, tanh.

    Zhu et al. 2017, section 7.2, with k = 64 and, for 128x128, the same six blocks. `widths` are (k, 2k, 4k): one layer
    that halves H and W for each width after the first. Its state is None.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        pairs = list(pairwise(widths))

        def normalised(convolution: nn.Module, width: int) -> list[nn.Module]:
            return [convolution, nn.InstanceNorm2d(width), nn.ReLU()]

        layers = normalised(nn.Conv2d(3, widths[0], 7, padding=3, padding_mode="reflect", bias=False), widths[0])
        for narrow, wide in pairs:
            layers += normalised(nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), wide)
        layers += [ResidualBlock(widths[-1]) for _ in range(NUM_RESIDUAL)]
        for narrow, wide in reversed(pairs):
            up = nn.ConvTranspose2d(wide, narrow, 3, 2, 1, output_padding=1, bias=False)
            layers += normalised(up, narrow)
        layers += [nn.Conv2d(widths[0], 3, 7, padding=3, padding_mode="reflect"), nn.Tanh()]
        self.layers = initialised(layers)

    def images(self, x: Tensor) -> Tensor:
        """Translate images (N,3,H,W); the result is float32."""
        return self.layers(x).to(x.dtype)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Translate frames (B,T,3,H,W), each by itself."""
        return self.images(x.flatten(0, 1)).unflatten(0, x.shape[:2]), None


class PatchDiscriminator(nn.Module):
    """A PatchGAN: a logit for each of many overlapping patches, (N,3,H,W) -> (N,1,h,w).

    Zhu et al. 2017, section 7.2: 4x4 convolutions, C64-C128-C256-C512 there; stride 2 but for the last width and the
    logits; no norm in the first. The patch is 70 pixels with four widths, 34 with three, 16 with two.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(SLOPE)]
        for number, (narrow, wide) in enumerate(pairwise(widths), 2):
            stride = 1 if number == len(widths) else 2
            convolution = nn.Conv2d(narrow, wide, 4, stride, 1, bias=False)
            layers += [convolution, nn.InstanceNorm2d(wide), nn.LeakyReLU(SLOPE)]
        self.layers = initialised([*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images, float32."""
        return self.layers(x).to(x.dtype)


class FramePredictor(nn.Module):
    """A U-Net that predicts the next frame from the two before it: two (N,3,H,W) -> (N,3,H,W).

    Isola et al. 2017, section 6.1.1: 4x4 convolutions of stride 2, LeakyReLU down, ReLU up, skips concatenated, tanh;
    no norm in the first and the last, nor at the bottom. H and W are halved once a width (there down to one pixel).
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        downs, ups = list[nn.Module](), list[nn.Module]()
        for number, (c_in, c_out) in enumerate(pairwise((6, *widths))):
            has_norm = 0 < number < len(widths) - 1
            layers: list[nn.Module] = [nn.LeakyReLU(SLOPE)] if number else []
            layers.append(nn.Conv2d(c_in, c_out, 4, 2, 1, bias=not has_norm))
            downs.append(initialised([*layers, *([nn.InstanceNorm2d(c_out)] if has_norm else [])]))
        for number, c_in in enumerate(widths):
            c_in = c_in if number == len(widths) - 1 else 2 * c_in  # with the skip
            c_out = widths[number - 1] if number else 3
            last = nn.InstanceNorm2d(c_out) if number else nn.Tanh()
            ups.append(initialised([nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=not number), last]))
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(ups)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the guess of the frame after `second`, float32."""
        skips = [torch.cat((first, second), 1)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        y = skips.pop()
        for up in list(self.ups)[::-1]:
            y = up(y)
            skip = skips.pop()
            y = torch.cat((y, skip), 1) if skips else y
        return y.to(first.dtype)
