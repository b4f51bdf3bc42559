"""The Triton kernels of `rlv2v.kernels.sequence_norm`: two forward, three backward. csrc/norm has the formulas.

    activate    a, p and the moments of a frame            a program: BC channels of one frame; grid (T B, C/BC)
    normalise   the states, and y                          BC channels of a clip; grid (B, C/BC, pixels)
    sums        of dy and dy (p - mean) over a frame       as activate
    spread      the states' gradients, and dx              as normalise, from the last frame to the first
    add_clips   the gradients of weight and bias           BC channels; grid (C/BC)
Running sums over T stay in registers, float64; they are cheap enough to be made by every program of a clip. Sums over
pixels are float32 in a lane and float64 beyond. No atomic addition: their order is always the same.

Frames are dense in the order T,B,H,W,C, moments (T,B,C), counts (T,B). What is None is not compiled.
"""

# Triton's decorators and the kernels that they take know no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["steps", "batch", "height", "width", "channels"]


@triton.jit
def windows_at(start, height, width, DOWN: tl.constexpr, RIGHT: tl.constexpr, BP: tl.constexpr):
    """Return row and column of BP windows, incomplete ones included, and whether each exists and is complete."""
    across = (width + RIGHT - 1) // RIGHT
    window = start + tl.arange(0, BP)
    row, column = window // across, window % across
    exists = row * DOWN < height
    return row, column, exists, exists & (row < height // DOWN) & (column < width // RIGHT)


@triton.jit
def places(pixel, channel, ok, channels):
    """Return the offsets of pixels' channels (BP,BC) from the first of a frame; 0 where they must not be read."""
    return tl.where(ok, pixel[:, None] * channels + channel[None, :], 0)


@triton.jit(do_not_specialize=SIZES)
def activate(
    x, residual, activated, pooled, values, frame_mean, frame_square,
    height, width, channels,
    SLOPE: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write a, p and the moments of p; values: p, wherever it lies."""
    frame = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channel < channels
    rows, columns = height // DOWN, width // RIGHT
    pixels = rows * columns
    of_frame, of_pooled = frame * height * width * channels, frame * pixels * channels
    total = tl.zeros([BP, BC], tl.float32)
    count = (height + DOWN - 1) // DOWN * ((width + RIGHT - 1) // RIGHT)
    for start in range(0, count, BP):
        row, column, exists, complete = windows_at(start, height, width, DOWN, RIGHT, BP)
        p = tl.zeros([BP, BC], tl.float32)
        for down in tl.static_range(DOWN):
            for right in tl.static_range(RIGHT):
                y, left = row * DOWN + down, column * RIGHT + right
                ok = (exists & (y < height) & (left < width))[:, None] & inside[None, :]
                at = of_frame + places(y * width + left, channel, ok, channels)
                value = tl.load(x + at, ok, 0.0).to(tl.float32)
                if residual is not None:
                    value += tl.load(residual + at, ok, 0.0).to(tl.float32)
                if activated is not None:
                    stored = tl.where(value > 0.0, value, value * SLOPE).to(activated.dtype.element_ty)
                    tl.store(activated + at, stored, ok)
                    value = stored.to(tl.float32)
                p += value
        ok = complete[:, None] & inside[None, :]
        if pooled is not None:
            stored = (p * (1.0 / (DOWN * RIGHT))).to(pooled.dtype.element_ty)
            tl.store(pooled + of_pooled + places(row * columns + column, channel, ok, channels), stored, ok)
            p = stored.to(tl.float32)
        total += tl.where(ok, p, 0.0)
    if frame_mean is not None:
        tl.debug_barrier()  # what is read now, other threads may have written
        centre = (tl.sum(total.to(tl.float64), 0) / pixels).to(tl.float32)
        first, second = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
        for start in range(0, pixels, BP):
            pixel = start + tl.arange(0, BP)
            ok = (pixel < pixels)[:, None] & inside[None, :]
            value = tl.load(values + of_pooled + places(pixel, channel, ok, channels), ok, 0.0).to(tl.float32)
            off = tl.where(ok, value - centre[None, :], 0.0)
            first += off
            second += off * off
        off = tl.sum(first.to(tl.float64), 0) / pixels
        mean = centre.to(tl.float64) + off
        at = frame * channels + channel
        tl.store(frame_mean + at, mean, inside)
        tl.store(frame_square + at, tl.sum(second.to(tl.float64), 0) / pixels - off * off + mean * mean, inside)


@triton.jit
def inverse_spread(mean, square, EPS: tl.constexpr):
    """Return 1 / sqrt(max(square - mean^2, 0) + eps), and that variance before the maximum."""
    variance = square - mean * mean
    return 1.0 / tl.sqrt(tl.where(variance > 0.0, variance, variance * 0.0) + EPS), variance


@triton.jit(do_not_specialize=SIZES)
def normalise(
    values, frame_mean, frame_square, frames, mean, square, weight, bias, y, counts, means, squares,
    steps, batch, height, width, channels,
    EPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the states after every frame, and y; height and width are those of p."""
    clip, part = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channel < channels
    pixels = height * width
    zero = tl.zeros([BC], tl.float64)
    seen, mean_sum, square_sum = zero, zero, zero
    if frames is not None:
        seen += tl.load(frames + clip)
        mean_sum += seen * tl.load(mean + clip * channels + channel, inside, 0.0)
        square_sum += seen * tl.load(square + clip * channels + channel, inside, 0.0)
    gain = tl.load(weight + channel, inside, 0.0).to(tl.float64)
    offset = tl.load(bias + channel, inside, 0.0).to(tl.float64)
    for t in range(steps):
        frame = (t * batch + clip).to(tl.int64)
        at = frame * channels + channel
        mean_sum += tl.load(frame_mean + at, inside, 0.0)
        square_sum += tl.load(frame_square + at, inside, 0.0)
        count = seen + (t + 1)
        mean_t, square_t = mean_sum / count, square_sum / count
        inverse, _ = inverse_spread(mean_t, square_t, EPS)
        centre, scale = mean_t.to(tl.float32), gain * inverse
        shift = (offset + (centre.to(tl.float64) - mean_t) * scale).to(tl.float32)
        tl.store(means + at, mean_t, inside & (part == 0))
        tl.store(squares + at, square_t, inside & (part == 0))
        tl.store(counts + frame + channel * 0, count, (channel == 0) & (part == 0))
        for start in range(part * BP, pixels, tl.num_programs(2) * BP):
            pixel = start + tl.arange(0, BP)
            ok = (pixel < pixels)[:, None] & inside[None, :]
            place = frame * pixels * channels + places(pixel, channel, ok, channels)
            off = tl.load(values + place, ok, 0.0).to(tl.float32) - centre[None, :]
            tl.store(y + place, off * scale.to(tl.float32)[None, :] + shift[None, :], ok)


@triton.jit(do_not_specialize=SIZES)
def sums(
    values, dy, means, of_dy, of_scale,
    height, width, channels,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the sums of dy and of dy (p - mean) over a frame, float64 (T,B,C); height and width are those of p."""
    frame = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channel < channels
    pixels = height * width
    at = frame * channels + channel
    mean = tl.load(means + at, inside, 0.0)
    centre = mean.to(tl.float32)
    first, second = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    for start in range(0, pixels, BP):
        pixel = start + tl.arange(0, BP)
        ok = (pixel < pixels)[:, None] & inside[None, :]
        place = frame * pixels * channels + places(pixel, channel, ok, channels)
        d = tl.load(dy + place, ok, 0.0).to(tl.float32)
        first += d
        second += d * (tl.load(values + place, ok, 0.0).to(tl.float32) - centre[None, :])
    d_y = tl.sum(first.to(tl.float64), 0)
    tl.store(of_dy + at, d_y, inside)
    tl.store(of_scale + at, tl.sum(second.to(tl.float64), 0) + (centre.to(tl.float64) - mean) * d_y, inside)


@triton.jit(do_not_specialize=SIZES)
def spread(
    values, activated, weight, frames, means, squares, dy, d_activated, d_means, d_squares, of_dy, of_scale,
    dx, d_weight_bias, d_mean, d_square, d_given_mean, d_given_square,
    steps, batch, height, width, channels,
    SLOPE: tl.constexpr, EPS: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Write all gradients: dp = dy scale + (p - centre) slant + level, shared out over its window, and the slope.

    d_weight_bias is float64 (B,2,C). Without a weight, d_means and d_squares are those of the frames' moments.
    """
    clip, part = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = channel < channels
    first = inside & (part == 0)
    zero = tl.zeros([BC], tl.float64)
    rows, columns = height // DOWN, width // RIGHT
    pixels = rows * columns
    share = 1.0 / (zero + pixels)
    count_windows = (height + DOWN - 1) // DOWN * ((width + RIGHT - 1) // RIGHT)
    seen, gain, d_frame_mean, d_frame_square, d_weight, d_bias = zero, zero, zero, zero, zero, zero
    if weight is not None:
        gain += tl.load(weight + channel, inside, 0.0).to(tl.float64)
    if frames is not None:
        seen += tl.load(frames + clip)
    for back in range(steps):
        t = steps - 1 - back
        frame = (t * batch + clip).to(tl.int64)
        at = frame * channels + channel
        mean, d_m, d_s = zero, zero, zero
        if means is not None:
            mean += tl.load(means + at, inside, 0.0)
        if d_means is not None:
            d_m += tl.load(d_means + at, inside, 0.0)
            d_s += tl.load(d_squares + at, inside, 0.0)
        centre = mean.to(tl.float32)
        scale = zero + 1.0
        if weight is not None:
            inverse, variance = inverse_spread(mean, tl.load(squares + at, inside, 0.0), EPS)
            scale = gain * inverse
            if of_dy is not None:
                d_y = tl.load(of_dy + at, inside, 0.0)
                d_scale = tl.load(of_scale + at, inside, 0.0)
                d_variance = -0.5 * d_scale * gain * inverse * inverse * inverse
                d_variance = tl.where(variance < 0.0, 0.0, d_variance)
                d_weight += d_scale * inverse
                d_bias += d_y
                d_m += -scale * d_y - 2.0 * mean * d_variance
                d_s += d_variance
            share_of_state = 1.0 / (seen + (t + 1))
            d_frame_mean += d_m * share_of_state
            d_frame_square += d_s * share_of_state
        else:
            d_frame_mean, d_frame_square = d_m, d_s
        if d_given_mean is not None:
            tl.store(d_given_mean + at, d_frame_mean, first)
            tl.store(d_given_square + at, d_frame_square, first)
        slant = (2.0 * d_frame_square * share).to(tl.float32)
        level = ((d_frame_mean + 2.0 * centre.to(tl.float64) * d_frame_square) * share).to(tl.float32)
        if dx is not None:
            for start in range(part * BP, count_windows, tl.num_programs(2) * BP):
                row, column, exists, complete = windows_at(start, height, width, DOWN, RIGHT, BP)
                ok = complete[:, None] & inside[None, :]
                place = frame * pixels * channels + places(row * columns + column, channel, ok, channels)
                d = tl.zeros([BP, BC], tl.float32)
                if dy is not None:
                    d += tl.load(dy + place, ok, 0.0).to(tl.float32) * scale.to(tl.float32)[None, :]
                if (weight is not None and d_given_mean is None) or (weight is None and d_means is not None):
                    off = tl.load(values + place, ok, 0.0).to(tl.float32) - centre[None, :]
                    d += tl.where(ok, off * slant[None, :] + level[None, :], 0.0)
                d *= 1.0 / (DOWN * RIGHT)
                for down in tl.static_range(DOWN):
                    for right in tl.static_range(RIGHT):
                        y, left = row * DOWN + down, column * RIGHT + right
                        ok_x = (exists & (y < height) & (left < width))[:, None] & inside[None, :]
                        of_x = frame * height * width * channels + places(y * width + left, channel, ok_x, channels)
                        d_x = d
                        if d_activated is not None:
                            d_x += tl.load(d_activated + of_x, ok_x, 0.0).to(tl.float32)
                        if activated is not None:
                            a = tl.load(activated + of_x, ok_x, 0.0).to(tl.float32)
                            d_x = tl.where(a > 0.0, d_x, d_x * SLOPE)
                        tl.store(dx + of_x, d_x, ok_x)
    if d_weight_bias is not None:
        to = d_weight_bias + clip * 2 * channels + channel
        tl.store(to, d_weight, first)
        tl.store(to + channels, d_bias, first)
    if d_mean is not None:
        tl.store(d_mean + clip * channels + channel, seen * d_frame_mean, first)
        tl.store(d_square + clip * channels + channel, seen * d_frame_square, first)


@triton.jit(do_not_specialize=SIZES)
def add_clips(d_weight_bias, d_weight, d_bias, batch, channels, BC: tl.constexpr):
    """Add the gradients of weight and bias up over the clips; grid (C/BC)."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < channels
    weight_sum, bias_sum = tl.zeros([BC], tl.float64), tl.zeros([BC], tl.float64)
    for clip in range(batch):
        at = d_weight_bias + clip * 2 * channels + channel
        weight_sum += tl.load(at, inside, 0.0)
        bias_sum += tl.load(at + channels, inside, 0.0)
    tl.store(d_weight + channel, weight_sum.to(tl.float32), inside)
    tl.store(d_bias + channel, bias_sum.to(tl.float32), inside)
