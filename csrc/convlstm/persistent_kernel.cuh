// The work of one CTA in each pass of the persistent ConvLSTM; layouts in persistent.h, formulas in gates.h.
//
// What a step needs from its own CTA only (pre-activations, cells, gates, carry) is loaded before the barrier, so the
// wait hides it. A thread owns the same pixels and channels at every step, so c and the carry of dc need no barrier.
#pragma once

#include "convlstm/convolution.cuh"

namespace rlv2v {

// The two neighbouring channels that a lane's sums belong to.
struct Channels {
  int first, count;  // count: how many of the two are below C
  bool paired;       // both are, at an even offset in memory

  RLV2V_DEVICE Channels(const PersistentGeometry& geo, int channel)
      : first(channel), count((channel < geo.channels) + (channel + 1 < geo.channels)),
        paired(count == 2 && geo.channels % 2 == 0) {}

  RLV2V_DEVICE device::Halves load(const std::uint16_t* from) const {
    if (paired) return device::load<device::Halves>(from);
    return {from[0], count > 1 ? from[1] : std::uint16_t{0}};
  }
  RLV2V_DEVICE device::Floats load(const float* from) const {
    if (paired) return device::load<device::Floats>(from);
    return {from[0], count > 1 ? from[1] : 0.0f};
  }
  // Halves to 16-bit memory, Floats to float.
  template <class T, class Pair>
  RLV2V_DEVICE void store(T* to, const Pair& pair) const {
    if (paired) {
      device::store(to, pair);
    } else {
      to[0] = pair.v[0];
      if (count > 1) to[1] = pair.v[1];
    }
  }
};

template <class D>
RLV2V_DEVICE device::Floats widen(device::Halves bits) {
  return {D::to_float(bits.v[0]), D::to_float(bits.v[1])};
}
template <class D>
RLV2V_DEVICE device::Halves narrow(device::Floats values) {
  return {D::from_float(values.v[0]), D::from_float(values.v[1])};
}

// The barrier between the CTAs of a group, once a step: what was stored before `arrive` is seen after the next `wait`.
class StepBarrier {
 public:
  RLV2V_DEVICE StepBarrier(const PersistentGeometry& geo, std::uint32_t* counters, int group)
      : counter_(counters + group * kCounterStride), ctas_(static_cast<std::uint32_t>(geo.slices * geo.ctas)) {}

  RLV2V_DEVICE void arrive() {
    device::sync_threads();
    if (device::thread() == 0) device::arrive(counter_);
    target_ += ctas_;
  }
  RLV2V_DEVICE void wait() const {
    if (device::thread() == 0) device::wait_for(counter_, target_);
    device::sync_threads();
  }

 private:
  std::uint32_t* const counter_;
  const std::uint32_t ctas_;
  std::uint32_t target_ = 0;
};

// Calls f(element, tap, value) for a run of weights in memory, taps fastest, by the lanes of a warp.
template <class F>
RLV2V_DEVICE void for_weights(const std::uint16_t* run, int elements, int taps, int lane, const F& f) {
  int element = lane / taps;
  int tap = lane % taps;
  RLV2V_UNROLL_4 for (int k = lane; k < elements * taps; k += 32) {
    f(element, tap, run[k]);
    element += 32 / taps;
    tap += 32 % taps;
    if (tap >= taps) {
      tap -= taps;
      ++element;
    }
  }
}

template <class Conv>
RLV2V_DEVICE void load_forward_weight(const PersistentForward& pass, const GridPosition& position, int slice,
                                      const Conv& conv) {
  const int channels = pass.geometry.channels;
  const int taps = pass.geometry.kernel * pass.geometry.kernel;
  for (int row = position.warp; row < 4 * slice; row += kPersistentThreads / 32) {
    const int gate = row / slice;
    const int in_slice = row % slice;
    const int channel = position.slice * slice + in_slice;
    if (channel >= channels) continue;
    // This order makes a lane's sums all four gates of its channels.
    const int column = (in_slice / 8 * 4 + gate) * 8 + in_slice % 8;
    const std::size_t first = (std::size_t(position.group) * 4 + gate) * channels + channel;
    for_weights(pass.w + first * channels * taps, channels, taps, position.lane,
                [&](int input, int tap, std::uint16_t value) { conv.set_weight(tap, input, column, value); });
  }
}

// One pixel and two channels of a thread: loaded before the convolution, finished after it.
template <class D>
struct ForwardCell {
  device::Floats c_prev;

  // a: the pre-activations from x, to which the convolution is added.
  RLV2V_DEVICE void load(const PersistentForward& pass, const Channels& channels, std::size_t pixel,
                         const float* c_prev_at, device::Floats (&a)[4]) {
    const int all = pass.geometry.channels;
    c_prev = c_prev_at ? channels.load(c_prev_at) : device::Floats{};
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      a[gate] = widen<D>(channels.load(pass.a + (pixel * 4 + gate) * all + channels.first));
    }
  }

  RLV2V_DEVICE void finish(const PersistentForward& pass, const Channels& channels, std::size_t pixel,
                           const device::Floats (&a)[4]) const {
    const int all = pass.geometry.channels;
    device::Floats gates[4], c, h;
    RLV2V_UNROLL for (int e = 0; e < 2; ++e) {
      RLV2V_UNROLL for (int gate = 0; gate < 3; ++gate)
        gates[gate].v[e] = device::sigmoid(a[gate].v[e]);
      gates[3].v[e] = device::tanh(a[3].v[e]);
      c.v[e] = gates[1].v[e] * c_prev.v[e] + gates[0].v[e] * gates[3].v[e];
      h.v[e] = gates[2].v[e] * device::tanh(c.v[e]);
    }
    channels.store(pass.cs + pixel * all + channels.first, c);
    channels.store(pass.hs + pixel * all + channels.first, narrow<D>(h));
    if (!pass.gates) return;
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      channels.store(pass.gates + (pixel * 4 + gate) * all + channels.first, narrow<device::Half>(gates[gate]));
    }
  }
};

// a_t += w * h_{t-1};  i, f, o = sigmoid;  g = tanh;  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
template <class D, int kSlice>
RLV2V_DEVICE void run_pass(const PersistentForward& pass) {
  constexpr int kAcross = kSlice / 8;  // neighbouring warps, each of 8 channels with all four gates
  constexpr int kRows = kAcross;       // four warps then cover 64 pixels
  const PersistentGeometry& geo = pass.geometry;
  const GridPosition position(geo);
  Convolution<D, kRows, 4, kAcross> conv(geo, position, geo.channels);
  conv.clear_weight();
  load_forward_weight(pass, position, kSlice, conv);  // seen by all threads after the barrier in front of each product

  const Channels channels(geo, position.slice * kSlice + position.warp % kAcross * 8 + position.lane % 4 * 2);
  const std::size_t pixels = std::size_t(geo.batch) * geo.height * geo.width;
  const std::size_t state = position.group * pixels * geo.channels;
  StepBarrier barrier(geo, pass.counters, position.group);
  for (int t = 0; t < geo.steps; ++t) {
    const std::size_t frame = (std::size_t(position.group) * geo.steps + t) * pixels;
    const std::uint16_t* h_prev = pass.h0 ? pass.h0 + state : nullptr;
    const float* c_prev = pass.c0 ? pass.c0 + state : nullptr;
    if (t > 0) h_prev = pass.hs + (frame - pixels) * geo.channels;
    if (t > 0) c_prev = pass.cs + (frame - pixels) * geo.channels;
    for (int tile = position.cta; tile < geo.tiles; tile += geo.ctas) {
      int pixels_at[kRows][2];
      float sums[kRows][4][4] = {};
      ForwardCell<D> cells[kRows][2];
      conv.locate(tile, channels.count, pixels_at);
      RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          if (pixels_at[m][half] < 0) continue;
          const float* c_prev_at =
              c_prev ? c_prev + std::size_t(pixels_at[m][half]) * geo.channels + channels.first : nullptr;
          device::Floats a[4];
          cells[m][half].load(pass, channels, frame + pixels_at[m][half], c_prev_at, a);
          RLV2V_UNROLL for (int k = 0; k < 8; ++k)
            sums[m][k / 2][2 * half + k % 2] = a[k / 2].v[k % 2];
        }
      }
      if (h_prev) {
        if (tile == position.cta) {
          if (t > 0) barrier.wait();
          conv.begin(tile, h_prev);
        }
        conv.accumulate(sums, tile, tile + geo.ctas < geo.tiles ? tile + geo.ctas : -1, h_prev);
      }
      RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          if (pixels_at[m][half] < 0) continue;
          device::Floats a[4];
          RLV2V_UNROLL for (int k = 0; k < 8; ++k)
            a[k / 2].v[k % 2] = sums[m][k / 2][2 * half + k % 2];
          cells[m][half].finish(pass, channels, frame + pixels_at[m][half], a);
        }
      }
    }
    if (t + 1 < geo.steps) barrier.arrive();
  }
}

// Loads the kernel rotated by 180 degrees, with inputs and outputs exchanged: the convolution's gradient of its input.
template <class Conv>
RLV2V_DEVICE void load_backward_weight(const PersistentBackward& pass, const GridPosition& position, int slice,
                                       const Conv& conv) {
  const int channels = pass.geometry.channels;
  const int taps = pass.geometry.kernel * pass.geometry.kernel;
  const int first = position.slice * slice;
  const int count = channels - first < slice ? channels - first : slice;
  for (int input = position.warp; input < 4 * channels; input += kPersistentThreads / 32) {
    const std::size_t row = (std::size_t(position.group) * 4 * channels + input) * channels + first;
    for_weights(pass.w + row * taps, count, taps, position.lane, [&](int column, int tap, std::uint16_t value) {
      conv.set_weight(taps - 1 - tap, input, column, value);
    });
  }
}

template <class D>
struct BackwardCell {
  device::Halves gates[4];
  device::Floats c, c_prev, dc;

  RLV2V_DEVICE void load(const PersistentBackward& pass, const Channels& channels, std::size_t pixel,
                         std::size_t in_state, const float* c_prev_at, bool is_last_step) {
    const int all = pass.geometry.channels;
    const std::size_t index = pixel * all + channels.first;
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      gates[gate] = channels.load(pass.gates + (pixel * 4 + gate) * all + channels.first);
    }
    c = channels.load(pass.cs + index);
    c_prev = c_prev_at ? channels.load(c_prev_at) : device::Floats{};
    dc = is_last_step ? device::Floats{} : channels.load(pass.dc0 + in_state);
    const device::Floats dcs = pass.dcs ? channels.load(pass.dcs + index) : device::Floats{};
    RLV2V_UNROLL for (int e = 0; e < 2; ++e)
      dc.v[e] += dcs.v[e];
  }

  RLV2V_DEVICE void finish(const PersistentBackward& pass, const Channels& channels, std::size_t pixel,
                           std::size_t in_state, const device::Floats& dh) const {
    const int all = pass.geometry.channels;
    device::Floats act[4], da[4], carry;
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      act[gate] = pass.activated ? widen<device::Half>(gates[gate]) : widen<D>(gates[gate]);
    }
    RLV2V_UNROLL for (int e = 0; e < 2; ++e) {
      if (!pass.activated) {
        RLV2V_UNROLL for (int gate = 0; gate < 3; ++gate)
          act[gate].v[e] = device::sigmoid(act[gate].v[e]);
        act[3].v[e] = device::tanh(act[3].v[e]);
      }
      const float i = act[0].v[e], f = act[1].v[e], o = act[2].v[e], g = act[3].v[e];
      const float tanh_c = device::tanh(c.v[e]);
      const float dc_now = dc.v[e] + dh.v[e] * o * (1.0f - tanh_c * tanh_c);
      da[0].v[e] = dc_now * g * i * (1.0f - i);
      da[1].v[e] = dc_now * c_prev.v[e] * f * (1.0f - f);
      da[2].v[e] = dh.v[e] * tanh_c * o * (1.0f - o);
      da[3].v[e] = dc_now * i * (1.0f - g * g);
      carry.v[e] = dc_now * f;
    }
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      channels.store(pass.da + (pixel * 4 + gate) * all + channels.first, narrow<D>(da[gate]));
    }
    channels.store(pass.dc0 + in_state, carry);
  }
};

// dh = dhs_t + w^T * da_{t+1};  dc = dcs_t + carry + dh o (1 - tanh^2 c_t)
// da_i, da_f, da_o = dc g, dc c_{t-1}, dh tanh c_t through sigmoid';  da_g = dc i through tanh'
// carry = dc f;  after t = 0: dh0 = w^T * da_0
template <class D, int kSlice>
RLV2V_DEVICE void run_pass(const PersistentBackward& pass) {
  constexpr int kColumns = kSlice / 8;
  const PersistentGeometry& geo = pass.geometry;
  const GridPosition position(geo);
  Convolution<D, 1, kColumns, 1> conv(geo, position, 4 * geo.channels);
  conv.clear_weight();
  load_backward_weight(pass, position, kSlice, conv);

  const int first_channel = position.slice * kSlice + position.lane % 4 * 2;
  const std::size_t pixels = std::size_t(geo.batch) * geo.height * geo.width;
  const std::size_t state = position.group * pixels;
  const int last = pass.dh0 ? -1 : 0;
  StepBarrier barrier(geo, pass.counters, position.group);
  for (int t = geo.steps - 1; t >= last; --t) {
    const std::size_t frame = (std::size_t(position.group) * geo.steps + t) * pixels;  // at t = -1 never read
    const std::uint16_t* da_next = t + 1 < geo.steps ? pass.da + (frame + pixels) * 4 * geo.channels : nullptr;
    const float* c_prev = pass.c0 ? pass.c0 + state * geo.channels : nullptr;
    if (t > 0) c_prev = pass.cs + (frame - pixels) * geo.channels;
    for (int tile = position.cta; tile < geo.tiles; tile += geo.ctas) {
      int pixels_at[kColumns][1][2];
      float sums[1][kColumns][4] = {};
      BackwardCell<D> cells[kColumns][2];
      RLV2V_UNROLL for (int n = 0; n < kColumns; ++n) {
        const Channels channels(geo, first_channel + 8 * n);
        conv.locate(tile, channels.count, pixels_at[n]);
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          const int pixel = pixels_at[n][0][half];
          if (pixel < 0 || t < 0) continue;
          const std::size_t in_frame = std::size_t(pixel) * geo.channels + channels.first;
          const device::Floats dh = widen<D>(channels.load(pass.dhs + frame * geo.channels + in_frame));
          sums[0][n][2 * half] = dh.v[0];
          sums[0][n][2 * half + 1] = dh.v[1];
          cells[n][half].load(pass, channels, frame + pixel, state * geo.channels + in_frame,
                              c_prev ? c_prev + in_frame : nullptr, t == geo.steps - 1);
        }
      }
      if (da_next) {
        if (tile == position.cta) {
          barrier.wait();
          conv.begin(tile, da_next);
        }
        conv.accumulate(sums, tile, tile + geo.ctas < geo.tiles ? tile + geo.ctas : -1, da_next);
      }
      RLV2V_UNROLL for (int n = 0; n < kColumns; ++n) {
        const Channels channels(geo, first_channel + 8 * n);
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          const int pixel = pixels_at[n][0][half];
          if (pixel < 0) continue;
          const device::Floats dh{sums[0][n][2 * half], sums[0][n][2 * half + 1]};
          const std::size_t in_state = (state + pixel) * geo.channels + channels.first;
          if (t < 0) {
            channels.store(pass.dh0 + in_state, narrow<D>(dh));
          } else {
            cells[n][half].finish(pass, channels, frame + pixel, in_state, dh);
          }
        }
      }
    }
    if (t > last) barrier.arrive();
  }
}

}  // namespace rlv2v
