"""The ConvLSTM recurrence in Triton: one launch a step, forward and backward, and one that packs the weight.

    forward   a += w_h * h_before;  i, f, o = sigmoid;  g = tanh;  c = f c_before + i g;  h = o tanh(c)
    backward  dh = dhs + w_h^T * da_next;  dc = dcs + carry + dh o (1 - tanh(c)^2);  carry = dc f
              da_i = dc g i(1-i);  da_f = dc c_before f(1-f);  da_o = dh tanh(c) o(1-o);  da_g = dc i (1-g^2)
Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes. The convolution is an implicit matrix product, as in
Chetlur et al. 2014, arXiv:1410.0759: rows are the pixels of one step's B frames, the sum runs over taps and channels.

Every tensor is dense in the order G,T,B,H,W,channels; a state has no T. `pixels` is B*H*W. A program takes BM pixels
and BC channels of one group: grid (ceil(pixels/BM), ceil(C/BC), G). Sums and pointwise maths in fp32. An argument that
may be None is left out at compile time. UPCAST: sum in fp32, for the interpreter, whose bfloat16 product multiplies bit
patterns. WIDE: 64-bit offsets inside the frames of one step; those between steps always are.
"""

# Triton's decorators and the kernels that they take know no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# A step number of 1, or a size that is divisible by 16, must not compile another kernel.
SIZES = ["height", "width", "pixels", "steps", "t", "before_steps", "before_t"]


@triton.jit
def tanh(x):
    """tanh without libdevice: a ratio of exponentials, which cannot overflow, or near 0 the series.

    (1-e)/(1+e) with e = exp(-2|x|) loses x's digits as x goes to 0; at |x| = 1/4 the series is good to 1e-8.
    """
    e = tl.exp(-2 * tl.abs(x))
    ratio = (1 - e) / (1 + e)
    s = x * x
    series = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def pixel_rows(pixels, BM: tl.constexpr, WIDE: tl.constexpr):
    """This program's pixels within the B frames of a step, and which of them there are."""
    pixel = tl.program_id(0) * BM + tl.arange(0, BM)
    if WIDE:
        pixel = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    return pixel, pixel < pixels


@triton.jit
def state_offsets(pixel, inside, C: tl.constexpr, BC: tl.constexpr):
    """Where this program's pixels and channels lie, as row and channel, and which exist.

    What does not exist points at what does: a masked address past the end faults (pytorch #186440). Channels wrap
    round, since a `where` would hide from the compiler that they lie side by side.
    """
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = inside[:, None]
    if C % BC:
        ok = ok & (channel < C)[None, :]
        channel %= C
    return tl.where(inside, pixel, 0)[:, None], channel[None, :], ok


@triton.jit
def convolve(
    acc,
    frames,
    weight,
    pixel,
    inside,
    height,
    width,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`acc` plus the k x k same-padded convolution of `frames` (pixels, CHANNELS) at this program's pixels.

    `weight` is this program's part of the packed one: (k*k, CHANNELS rounded up to BK, columns of acc), and zero past
    CHANNELS, where the pixel's channels are read once more. One loop over taps and channels: Triton pipelines only the
    innermost one, and a tap may be a single chunk.
    """
    CHUNKS: tl.constexpr = (CHANNELS + BK - 1) // BK
    COLUMNS: tl.constexpr = acc.shape[1]
    x = pixel % width
    y = pixel // width % height
    lane = tl.arange(0, BK)
    tile = lane[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for step in range(K * K * CHUNKS):
        tap = step // CHUNKS
        dy = tap // K - K // 2
        dx = tap % K - K // 2
        near = inside & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)
        row = tl.where(near, pixel + dy * width + dx, 0)
        channel = step % CHUNKS * BK + lane
        if CHANNELS % BK:
            channel %= CHANNELS
        left = tl.load(frames + row[:, None] * CHANNELS + channel[None, :], mask=near[:, None], other=0.0)
        right = tl.load(weight + step * (BK * COLUMNS) + tile)
        if UPCAST:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def packed_part(weight, CHANNELS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, COLUMNS: tl.constexpr):
    """Where this program's group and channel tile begin in the packed weight."""
    SIZE: tl.constexpr = K * K * ((CHANNELS + BK - 1) // BK) * BK * COLUMNS
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    return weight + part * SIZE


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
    """`weight` (G,4C,C,k,k) in the order in which the programs read it: (G, channel tiles, k*k, rows, columns).

    It is dense with the taps or the input channels last: `row_stride` is from one of these to the next, `tap_stride`
    from one of those.

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
    h_before,
    c_before,
    hs,
    cs,
    gates,
    height,
    width,
    pixels,
    steps,
    t,
    before_steps,
    before_t,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Step t of the forward: writes h and c of step t, and the activated gates, which may lie where `a` does.

    a, gates (G,T,B,4C,H,W), gates or None; bias (G,4C) or None; hs, cs (G,T,B,C,H,W); weight as `pack_weight` leaves
    it. The state before is step `before_t` of `before_steps`: of hs and cs, or the only one of h0 and c0. h_before
    None: no product.
    """
    group = tl.program_id(2).to(tl.int64)
    here = (group * steps + t) * pixels
    before = (group * before_steps + before_t) * pixels
    pixel, inside = pixel_rows(pixels, BM, WIDE)
    row, channel, ok = state_offsets(pixel, inside, C, BC)
    at = row * (4 * C) + channel
    a += here * (4 * C)
    acc = tl.zeros((BM, 4 * BC), dtype=tl.float32)
    if h_before is not None:
        part = packed_part(weight, C, K, BK, 4 * BC)
        acc = convolve(acc, h_before + before * C, part, pixel, inside, height, width, C, K, BK, UPCAST)
    i_and_o, f_and_g = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BC, 2)), (0, 2, 1, 3)))
    i, o = tl.split(i_and_o)
    f, g = tl.split(f_and_g)
    i += tl.load(a + at, mask=ok, other=0.0).to(tl.float32)
    f += tl.load(a + at + C, mask=ok, other=0.0).to(tl.float32)
    o += tl.load(a + at + 2 * C, mask=ok, other=0.0).to(tl.float32)
    g += tl.load(a + at + 3 * C, mask=ok, other=0.0).to(tl.float32)
    if bias is not None:
        bias += group * (4 * C) + channel  # channels that do not exist wrap round
        i += tl.load(bias).to(tl.float32)
        f += tl.load(bias + C).to(tl.float32)
        o += tl.load(bias + 2 * C).to(tl.float32)
        g += tl.load(bias + 3 * C).to(tl.float32)
    i = tl.sigmoid(i)
    f = tl.sigmoid(f)
    o = tl.sigmoid(o)
    g = tanh(g)
    c = i * g
    at_state = row * C + channel
    if c_before is not None:
        c += f * tl.load(c_before + before * C + at_state, mask=ok, other=0.0)
    tl.store(cs + here * C + at_state, c, mask=ok)
    tl.store(hs + here * C + at_state, (o * tanh(c)).to(hs.dtype.element_ty), mask=ok)
    if gates is not None:
        gates += here * (4 * C)
        tl.store(gates + at, i.to(gates.dtype.element_ty), mask=ok)
        tl.store(gates + at + C, f.to(gates.dtype.element_ty), mask=ok)
        tl.store(gates + at + 2 * C, o.to(gates.dtype.element_ty), mask=ok)
        tl.store(gates + at + 3 * C, g.to(gates.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=SIZES)
def backward_step(
    da_next,
    weight,
    dhs,
    dcs,
    gates,
    cs,
    c_before,
    carry_before,
    carry,
    da,
    height,
    width,
    pixels,
    steps,
    t,
    before_steps,
    before_t,
    C: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    ACTIVATED: tl.constexpr,
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Step t of the backward: writes da of step t and the carry, dc f, which is what step t-1 adds to its dc.

    da_next, da, gates (G,T,B,4C,H,W): da_next is da, of which step t+1 is read, or None at the last step. gates are
    activated, or pre-activations when not ACTIVATED. dhs, dcs, cs (G,T,B,C,H,W), dcs or None. carry (G,B,C,H,W) fp32;
    carry_before is the same buffer, or None at the last step. c_before as in `forward_step`. weight TRANSPOSED.
    """
    group = tl.program_id(2).to(tl.int64)
    here = (group * steps + t) * pixels
    pixel, inside = pixel_rows(pixels, BM, WIDE)
    dh = tl.zeros((BM, BC), dtype=tl.float32)
    if da_next is not None:
        part = packed_part(weight, 4 * C, K, BK, BC)
        later = da_next + (here + pixels) * (4 * C)
        dh = convolve(dh, later, part, pixel, inside, height, width, 4 * C, K, BK, UPCAST)
    row, channel, ok = state_offsets(pixel, inside, C, BC)
    at = row * (4 * C) + channel
    at_state = row * C + channel
    gates += here * (4 * C)
    i = tl.load(gates + at, mask=ok, other=0.0).to(tl.float32)
    f = tl.load(gates + at + C, mask=ok, other=0.0).to(tl.float32)
    o = tl.load(gates + at + 2 * C, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(gates + at + 3 * C, mask=ok, other=0.0).to(tl.float32)
    if not ACTIVATED:
        i = tl.sigmoid(i)
        f = tl.sigmoid(f)
        o = tl.sigmoid(o)
        g = tanh(g)
    dh += tl.load(dhs + here * C + at_state, mask=ok, other=0.0).to(tl.float32)
    tanh_c = tanh(tl.load(cs + here * C + at_state, mask=ok, other=0.0))
    dc = dh * o * (1 - tanh_c * tanh_c)
    if dcs is not None:
        dc += tl.load(dcs + here * C + at_state, mask=ok, other=0.0)
    at_carry = group * pixels * C + at_state
    if carry_before is not None:
        dc += tl.load(carry_before + at_carry, mask=ok, other=0.0)
    tl.store(carry + at_carry, dc * f, mask=ok)
    da_f = tl.zeros((BM, BC), dtype=tl.float32)
    if c_before is not None:
        before = (group * before_steps + before_t) * pixels * C
        da_f = dc * tl.load(c_before + before + at_state, mask=ok, other=0.0) * f * (1 - f)
    da += here * (4 * C)
    tl.store(da + at, (dc * g * i * (1 - i)).to(da.dtype.element_ty), mask=ok)
    tl.store(da + at + C, da_f.to(da.dtype.element_ty), mask=ok)
    tl.store(da + at + 2 * C, (dh * tanh_c * o * (1 - o)).to(da.dtype.element_ty), mask=ok)
    tl.store(da + at + 3 * C, (dc * i * (1 - g * g)).to(da.dtype.element_ty), mask=ok)


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
    UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of the state before the first step: dh0 (G,B,C,H,W) = w_h^T * da_0."""
    group = tl.program_id(2).to(tl.int64)
    pixel, inside = pixel_rows(pixels, BM, WIDE)
    acc = tl.zeros((BM, BC), dtype=tl.float32)
    part = packed_part(weight, 4 * C, K, BK, BC)
    first = da + group * steps * pixels * (4 * C)
    acc = convolve(acc, first, part, pixel, inside, height, width, 4 * C, K, BK, UPCAST)
    row, channel, ok = state_offsets(pixel, inside, C, BC)
    tl.store(dh0 + group * pixels * C + row * C + channel, acc.to(dh0.dtype.element_ty), mask=ok)
