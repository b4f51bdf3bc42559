"""The Triton kernels of the recurrence: one launch a step, forward and backward, and one that packs the weight.

    forward   a += w_h * h_prev;  i, f, o = sigmoid(a);  g = tanh(a);  c = f c_prev + i g;  h = o tanh(c)
    backward  dh = dhs + w_h^T * da_next;  dc = dcs + carry + dh o (1 - tanh(c)^2);  carry = dc f
              da_i = dc g i(1-i);  da_f = dc c_prev f(1-f);  da_o = dh tanh(c) o(1-o);  da_g = dc i (1-g^2)
Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes. The convolution is an implicit matrix product, as in
Chetlur et al. 2014, arXiv:1410.0759: rows are the pixels of one step's B frames, the sum runs over taps and channels.

Every tensor is dense in the order G,T,B,H,W,channels; a state has no T. `pixels` is B*H*W. A program takes BM pixels
and BC channels of one group: grid (ceil(pixels/BM), ceil(C/BC), G). Sums and pointwise maths in fp32. An argument that
may be None is left out at compile time. WIDE: 64-bit offsets within a step; those between steps always are.
TF32: float32 products of 10 bits of mantissa, on tensor cores.
"""

# Triton's decorators and the kernels that they take know no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # whose bfloat16 product multiplies bit patterns
# A step number of 1, or a size that is divisible by 16, must not compile another kernel.
SIZES = ["height", "width", "pixels", "steps", "t"]


@triton.jit
def tanh(x):
    """Return tanh without libdevice: a ratio of exponentials, which cannot overflow, or the series near 0.

    (1-e)/(1+e) with e = exp(-2|x|) loses x's digits as x goes to 0; at |x| = 1/4 the series is good to 1e-8.
    """
    e = tl.exp(-2 * tl.abs(x))
    ratio = (1 - e) / (1 + e)
    s = x * x
    series = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def pixel_rows(pixels, BM: tl.constexpr, WIDE: tl.constexpr):
    """Return this program's pixels within the B frames of a step, and which of them exist."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    if WIDE:
        pixel = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    return pixel, pixel < pixels


@triton.jit
def state_offsets(pixel, inside, C: tl.constexpr, BC: tl.constexpr):
    """Return the row and channel of this program's pixels and channels, and which of them exist.

    Those that do not exist point at some that do: a masked address past the end faults (pytorch #186440). Channels wrap
    round, since a `where` would hide from the compiler that they lie side by side.
    """
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = inside[:, None]
    if C % BC:
        ok = ok & (channel < C)[None, :]
        channel %= C
    return tl.where(inside, pixel, 0)[:, None], channel[None, :], ok


@triton.jit
def load_gates(pointers, ok, C: tl.constexpr):
    """Return four gates in fp32, which lie C elements apart from `pointers` on; zero where not `ok`."""
    i = tl.load(pointers, mask=ok, other=0.0).to(tl.float32)
    f = tl.load(pointers + C, mask=ok, other=0.0).to(tl.float32)
    o = tl.load(pointers + 2 * C, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(pointers + 3 * C, mask=ok, other=0.0).to(tl.float32)
    return i, f, o, g


@triton.jit
def store_gates(pointers, ok, i, f, o, g, C: tl.constexpr):
    """Store four gates as `load_gates` reads them, rounded to the dtype of the memory."""
    tl.store(pointers, i, mask=ok)
    tl.store(pointers + C, f, mask=ok)
    tl.store(pointers + 2 * C, o, mask=ok)
    tl.store(pointers + 3 * C, g, mask=ok)


@triton.jit
def convolve(
    frames,
    weight,
    pixel,
    ok,
    height,
    width,
    C: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    TF32: tl.constexpr,
):
    """Return the k x k same-padded convolution (pixels, COLUMNS) of `frames` (pixels, C) at this program's pixels.

    `weight` is packed: (groups, channel tiles, k*k, C rounded up to BK, COLUMNS), and zero past C, where
    the pixel's channels are read once more. One loop over taps and channels: Triton pipelines only the innermost one,
    and a tap may be a single chunk.
    """
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    weight += part * (K * K * CHUNKS * BK * COLUMNS)
    acc = tl.zeros((pixel.shape[0], COLUMNS), dtype=tl.float32)
    x = pixel % width
    y = pixel // width % height
    lane = tl.arange(0, BK)
    tile = lane[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for step in range(K * K * CHUNKS):
        tap = step // CHUNKS
        dy = tap // K - K // 2
        dx = tap % K - K // 2
        near = ok & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        row = tl.where(near, pixel + dy * width + dx, 0)
        channel = step % CHUNKS * BK + lane
        if C % BK:
            channel %= C
        left = tl.load(frames + row[:, None] * C + channel[None, :], mask=near[:, None], other=0.0)
        right = tl.load(weight + step * (BK * COLUMNS) + tile)
        if INTERPRETED and left.dtype == tl.bfloat16:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["row_stride", "tap_stride"])
def pack_weight(
    weight,
    packed,
    row_stride,
    tap_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pack `weight` (G,4C,C,k,k) into the order in which programs read it: (G, channel tiles, k*k, rows, columns).

    The weight is dense with the taps or the input channels last; `row_stride` is from one input channel to the next,
    `tap_stride` from one tap to the next.

    Forward: rows are the C input channels, columns (2, BC, 2): the two bits of the gate around the channel, so that the
    tensor cores leave the four sums of a channel in one thread. TRANSPOSED, for the backward: rows are the 4C
    pre-activations, columns the BC channels of dh, and the taps turn round. Zeros fill the rows up to a multiple of BK
    and the columns up to one of BC. Grid: (ceil(elements of a group/BLOCK), G).
    """
    CHANNELS: tl.constexpr = 4 * C if TRANSPOSED else C
    ROWS: tl.constexpr = (CHANNELS + BK - 1) // BK * BK
    COLUMNS: tl.constexpr = BC if TRANSPOSED else 4 * BC
    ELEMENTS: tl.constexpr = (C + BC - 1) // BC * K * K * ROWS * COLUMNS
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = index % COLUMNS
    row = index // COLUMNS % ROWS
    tap = index // (COLUMNS * ROWS) % (K * K)
    tile = index // (COLUMNS * ROWS * K * K)
    if TRANSPOSED:
        channel = tile * BC + column
        source = row * (C * K * K) + channel * row_stride + (K * K - 1 - tap) * tap_stride
    else:
        channel = tile * BC + column // 2 % BC
        gate = column // (2 * BC) * 2 + column % 2
        source = (gate * C + channel) * (C * K * K) + row * row_stride + tap * tap_stride
    real = (index < ELEMENTS) & (row < CHANNELS) & (channel < C)
    group = tl.program_id(1).to(tl.int64)
    value = tl.load(weight + group * (4 * C * C * K * K) + tl.where(real, source, 0), mask=real, other=0.0)
    tl.store(packed + group * ELEMENTS + index, value, mask=index < ELEMENTS)


@triton.jit(do_not_specialize=SIZES)
def forward_step(
    a,
    bias,
    weight,
    h_prev,
    c_prev,
    hs,
    cs,
    gates,
    height,
    width,
    pixels,
    steps,
    t,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
    TF32: tl.constexpr,
):
    """Run step t of the forward: write its h and c, and the activated gates, which may lie in the memory of `a`.

    a, gates (G,T,B,4C,H,W), gates or None; bias (G,4C); hs, cs (G,T,B,C,H,W); weight as `pack_weight` leaves
    it. h_prev, c_prev: hs and cs, whose step t-1 is read; at step 0 the state before it (G,B,C,H,W), or None for zero.
    """
    group = tl.program_id(2).to(tl.int64)
    first = (group * steps + t) * pixels
    first_prev = tl.where(t > 0, group * steps + t - 1, group) * pixels
    pixel, inside = pixel_rows(pixels, BM, WIDE)
    row, channel, ok = state_offsets(pixel, inside, C, BC)
    offset = row * (4 * C) + channel
    offset_state = row * C + channel
    acc = tl.zeros((BM, 4 * BC), dtype=tl.float32)
    if h_prev is not None:
        h_frames = h_prev + first_prev * C
        acc = convolve(h_frames, weight, pixel, inside, height, width, C, K, 4 * BC, BK, TF32)
    i_and_o, f_and_g = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BC, 2)), (0, 2, 1, 3)))
    i, o = tl.split(i_and_o)
    f, g = tl.split(f_and_g)
    i_x, f_x, o_x, g_x = load_gates(a + first * (4 * C) + offset, ok, C)
    i += i_x
    f += f_x
    o += o_x
    g += g_x
    bias += group * (4 * C) + channel  # channels that do not exist wrap round
    i += tl.load(bias).to(tl.float32)
    f += tl.load(bias + C).to(tl.float32)
    o += tl.load(bias + 2 * C).to(tl.float32)
    g += tl.load(bias + 3 * C).to(tl.float32)
    i, f, o, g = tl.sigmoid(i), tl.sigmoid(f), tl.sigmoid(o), tanh(g)
    c = i * g
    if c_prev is not None:
        c += f * tl.load(c_prev + first_prev * C + offset_state, mask=ok, other=0.0)
    tl.store(cs + first * C + offset_state, c, mask=ok)
    tl.store(hs + first * C + offset_state, o * tanh(c), mask=ok)
    if gates is not None:
        store_gates(gates + first * (4 * C) + offset, ok, i, f, o, g, C)


@triton.jit(do_not_specialize=SIZES)
def backward_step(
    da_next,
    weight,
    dhs,
    dcs,
    gates,
    cs,
    c_prev,
    carry_next,
    carry,
    da,
    height,
    width,
    pixels,
    steps,
    t,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATED: tl.constexpr,
    WIDE: tl.constexpr,
    TF32: tl.constexpr,
):
    """Run step t of the backward: write its da and the carry, dc f, which step t-1 adds to its dc.

    da_next, da, gates (G,T,B,4C,H,W): da_next is da, whose step t+1 is read, or None at the last step. gates are
    activated, or pre-activations if not ACTIVATED. dhs, dcs, cs (G,T,B,C,H,W), dcs or None. carry (G,B,C,H,W) fp32;
    carry_next is the same buffer, or None at the last step. c_prev as in `forward_step`. weight TRANSPOSED.
    """
    group = tl.program_id(2).to(tl.int64)
    first = (group * steps + t) * pixels
    pixel, inside = pixel_rows(pixels, BM, WIDE)
    dh = tl.zeros((BM, BC), dtype=tl.float32)
    if da_next is not None:
        frames_next = da_next + (first + pixels) * (4 * C)
        dh = convolve(frames_next, weight, pixel, inside, height, width, 4 * C, K, BC, BK, TF32)
    row, channel, ok = state_offsets(pixel, inside, C, BC)
    offset = row * (4 * C) + channel
    offset_state = row * C + channel
    i, f, o, g = load_gates(gates + first * (4 * C) + offset, ok, C)
    if not ACTIVATED:
        i, f, o, g = tl.sigmoid(i), tl.sigmoid(f), tl.sigmoid(o), tanh(g)
    dh += tl.load(dhs + first * C + offset_state, mask=ok, other=0.0).to(tl.float32)
    tanh_c = tanh(tl.load(cs + first * C + offset_state, mask=ok, other=0.0))
    dc = dh * o * (1 - tanh_c * tanh_c)
    if dcs is not None:
        dc += tl.load(dcs + first * C + offset_state, mask=ok, other=0.0)
    offset_carry = group * pixels * C + offset_state
    if carry_next is not None:
        dc += tl.load(carry_next + offset_carry, mask=ok, other=0.0)
    tl.store(carry + offset_carry, dc * f, mask=ok)
    da_f = tl.zeros((BM, BC), dtype=tl.float32)
    if c_prev is not None:
        first_prev = tl.where(t > 0, group * steps + t - 1, group) * pixels
        da_f = dc * tl.load(c_prev + first_prev * C + offset_state, mask=ok, other=0.0) * f * (1 - f)
    da_i = dc * g * i * (1 - i)
    da_o = dh * tanh_c * o * (1 - o)
    store_gates(da + first * (4 * C) + offset, ok, da_i, da_f, da_o, dc * i * (1 - g * g), C)


@triton.jit(do_not_specialize=SIZES)
def backward_state(
    da,
    weight,
    dh0,
    height,
    width,
    pixels,
    steps,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
    TF32: tl.constexpr,
):
    """Write the gradient of the hidden state before the first step: dh0 (G,B,C,H,W) = w_h^T * da_0."""
    group = tl.program_id(2).to(tl.int64)
    pixel, inside = pixel_rows(pixels, BM, WIDE)
    frames = da + group * steps * pixels * (4 * C)
    dh = convolve(frames, weight, pixel, inside, height, width, 4 * C, K, BC, BK, TF32)
    row, channel, ok = state_offsets(pixel, inside, C, BC)
    tl.store(dh0 + group * pixels * C + row * C + channel, dh, mask=ok)
