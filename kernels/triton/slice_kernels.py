"""The Triton kernels of `rlv2v.kernels.bilateral`: coefficients are read from the eight cells around a pixel.

forward, and the gradients of guide and frames: a program takes BLOCK pixels of one frame; grid (ceil(H W/BLOCK), B).
The gradient of the grid: a program takes one cell of one frame, and walks over the pixels that it reaches, BLOCK at a
time; grid (h w, bins, B). No atomic addition: the order of its sums is always the same.

Every tensor is dense; sums are float32.
"""

# Triton's decorators and the kernels that they take know no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ["height", "width", "grid_height", "grid_width"]


@triton.jit
def place(position, cells):
    """Return the cells below and above a place on an axis, and the fraction of the way."""
    inside = tl.minimum(tl.maximum(position, 0.0), cells - 1.0)
    low = inside.to(tl.int32)
    # What a NaN became must not be read.
    low = tl.minimum(tl.maximum(low, 0), cells - 1)
    return low, tl.minimum(low + 1, cells - 1), inside - low


@triton.jit
def at_bin(cells, low_y, high_y, down, low_x, high_x, right, grid_width, ok):
    """Return one coefficient in one bin, between four cells."""
    top, bottom = cells + low_y * grid_width, cells + high_y * grid_width
    a = tl.load(top + low_x, ok, 0.0).to(tl.float32)
    b = tl.load(top + high_x, ok, 0.0).to(tl.float32)
    c = tl.load(bottom + low_x, ok, 0.0).to(tl.float32)
    d = tl.load(bottom + high_x, ok, 0.0).to(tl.float32)
    upper, lower = a + right * (b - a), c + right * (d - c)
    return upper + down * (lower - upper)


@triton.jit(do_not_specialize=SIZES)
def slice_apply(
    tables, guide, frames, out, d_out, d_guide, d_frames,
    height, width, grid_height, grid_width,
    BINS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out, or with BACKWARD d_guide and d_frames."""
    pixels = height * width
    frame = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = pixel < pixels
    pixel = tl.where(ok, pixel, 0)
    y, x = pixel // width, pixel % width
    low_y, high_y, down = place((y + 0.5) * (grid_height / height) - 0.5, grid_height)
    low_x, high_x, right = place((x + 0.5) * (grid_width / width) - 0.5, grid_width)
    position = tl.load(guide + frame * pixels + pixel, ok, 0.0).to(tl.float32) * BINS - 0.5
    low_bin, high_bin, up = place(position, BINS)
    cells = grid_height * grid_width
    of_frame = tables + frame * 12 * BINS * cells
    planes = frame * 3 * pixels + pixel
    r = tl.load(frames + planes, ok, 0.0).to(tl.float32)
    g = tl.load(frames + planes + pixels, ok, 0.0).to(tl.float32)
    b = tl.load(frames + planes + 2 * pixels, ok, 0.0).to(tl.float32)
    d_place = tl.zeros([BLOCK], tl.float32)
    d_r, d_g, d_b = d_place, d_place, d_place
    for c in tl.static_range(3):
        total = tl.zeros([BLOCK], tl.float32)
        slope = tl.zeros([BLOCK], tl.float32)
        d = total
        if BACKWARD:
            d = tl.load(d_out + planes + c * pixels, ok, 0.0).to(tl.float32)
        for k in tl.static_range(4):
            table = of_frame + (4 * c + k) * BINS * cells
            first = at_bin(table + low_bin * cells, low_y, high_y, down, low_x, high_x, right, grid_width, ok)
            last = at_bin(table + high_bin * cells, low_y, high_y, down, low_x, high_x, right, grid_width, ok)
            value = first + up * (last - first)
            colour = r if k == 0 else (g if k == 1 else b)
            if k == 3:
                total += value
                slope += last - first
            else:
                total += value * colour
                slope += (last - first) * colour
                if BACKWARD:
                    if k == 0:
                        d_r += value * d
                    if k == 1:
                        d_g += value * d
                    if k == 2:
                        d_b += value * d
        if BACKWARD:
            d_place += slope * d
        else:
            tl.store(out + planes + c * pixels, total, ok)
    if BACKWARD:
        inside = (position > 0.0) & (position < BINS - 1.0)
        tl.store(d_guide + frame * pixels + pixel, tl.where(inside, d_place * BINS, 0.0), ok)
        tl.store(d_frames + planes, d_r, ok)
        tl.store(d_frames + planes + pixels, d_g, ok)
        tl.store(d_frames + planes + 2 * pixels, d_b, ok)


@triton.jit
def reach(cell, cells, pixels):
    """Return the first pixel of an axis that a cell reaches, and the first beyond, both perhaps a little too far out.

    A cell at an end of the axis reaches all pixels up to it.
    """
    scale = pixels / cells
    first = ((cell - 0.5) * scale - 1.5).to(tl.int32)
    last = ((cell + 1.5) * scale + 1.5).to(tl.int32) + 1
    first = tl.where(cell == 0, 0, tl.maximum(first, 0))
    return first, tl.where(cell == cells - 1, pixels, tl.minimum(last, pixels))


@triton.jit
def weight_at(position, cell, cells):
    """Return the weight of a cell at a place on its axis."""
    inside = tl.minimum(tl.maximum(position, 0.0), cells - 1.0)
    return tl.maximum(1.0 - tl.abs(inside - cell), 0.0)


@triton.jit(do_not_specialize=SIZES)
def grid_gradient(
    guide, frames, d_out, d_grid,
    height, width, grid_height, grid_width,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one cell's twelve coefficients."""
    pixels = height * width
    cell, bin_ = tl.program_id(0), tl.program_id(1)
    frame = tl.program_id(2).to(tl.int64)
    row, column = cell // grid_width, cell % grid_width
    first_y, last_y = reach(row, grid_height, height)
    first_x, last_x = reach(column, grid_width, width)
    across = last_x - first_x
    count = (last_y - first_y) * across
    zeros = tl.zeros([BLOCK], tl.float32)
    r0, r1, r2, r3 = zeros, zeros, zeros, zeros
    g0, g1, g2, g3 = zeros, zeros, zeros, zeros
    b0, b1, b2, b3 = zeros, zeros, zeros, zeros
    start = 0
    while start < count:
        index = start + tl.arange(0, BLOCK)
        ok = index < count
        y, x = first_y + index // across, first_x + index % across
        pixel = tl.where(ok, y * width + x, 0)
        weight = weight_at((y + 0.5) * (grid_height / height) - 0.5, row, grid_height)
        weight *= weight_at((x + 0.5) * (grid_width / width) - 0.5, column, grid_width)
        position = tl.load(guide + frame * pixels + pixel, ok, 0.0).to(tl.float32) * BINS - 0.5
        weight *= weight_at(position, bin_, BINS)
        planes = frame * 3 * pixels + pixel
        r = tl.load(frames + planes, ok, 0.0).to(tl.float32)
        g = tl.load(frames + planes + pixels, ok, 0.0).to(tl.float32)
        b = tl.load(frames + planes + 2 * pixels, ok, 0.0).to(tl.float32)
        d_r = tl.load(d_out + planes, ok, 0.0).to(tl.float32) * weight
        d_g = tl.load(d_out + planes + pixels, ok, 0.0).to(tl.float32) * weight
        d_b = tl.load(d_out + planes + 2 * pixels, ok, 0.0).to(tl.float32) * weight
        r0, r1, r2, r3 = r0 + d_r * r, r1 + d_r * g, r2 + d_r * b, r3 + d_r
        g0, g1, g2, g3 = g0 + d_g * r, g1 + d_g * g, g2 + d_g * b, g3 + d_g
        b0, b1, b2, b3 = b0 + d_b * r, b1 + d_b * g, b2 + d_b * b, b3 + d_b
        start += BLOCK
    cells = grid_height * grid_width
    to = d_grid + (frame * 12 * BINS + bin_) * cells + cell
    step = BINS * cells
    tl.store(to, tl.sum(r0))
    tl.store(to + step, tl.sum(r1))
    tl.store(to + 2 * step, tl.sum(r2))
    tl.store(to + 3 * step, tl.sum(r3))
    tl.store(to + 4 * step, tl.sum(g0))
    tl.store(to + 5 * step, tl.sum(g1))
    tl.store(to + 6 * step, tl.sum(g2))
    tl.store(to + 7 * step, tl.sum(g3))
    tl.store(to + 8 * step, tl.sum(b0))
    tl.store(to + 9 * step, tl.sum(b1))
    tl.store(to + 10 * step, tl.sum(b2))
    tl.store(to + 11 * step, tl.sum(b3))
