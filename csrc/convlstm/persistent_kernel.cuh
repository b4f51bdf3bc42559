// Both passes of the persistent ConvLSTM, a CTA's part; layouts in persistent.h, formulas in kernels/persistent.py.
//
// What a step needs from its own CTA only (pre-activations, cells, gates, carry) is loaded before the barrier, so that
// the wait hides it. A thread owns the same pixels and channels at every step: c and the carry of dc need no barrier.
#pragma once

#include "convlstm/convolution.cuh"

namespace rlv2v {

// The two channels beside each other that a lane's sums belong to.
struct Channels {
  int first, count;  // count of them below C
  bool paired;       // both there, and at an even offset in memory

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
      to[0] = pair.of[0];
      if (count > 1) to[1] = pair.of[1];
    }
  }
};

template <class D>
RLV2V_DEVICE device::Floats widened(device::Halves bits) {
  return {D::to_float(bits.of[0]), D::to_float(bits.of[1])};
}
template <class D>
RLV2V_DEVICE device::Halves narrowed(device::Floats values) {
  return {D::from_float(values.of[0]), D::from_float(values.of[1])};
}

// The barrier between the CTAs of a group, once a step: what was stored before `leave` is seen after the next `enter`.
class StepBarrier {
 public:
  RLV2V_DEVICE StepBarrier(const PersistentGeometry& geo, std::uint32_t* counters, int group)
      : counter_(counters + group * kCounterStride), ctas_(static_cast<std::uint32_t>(geo.slices * geo.ctas)) {}

  RLV2V_DEVICE void leave() {
    device::sync_threads();
    if (device::thread() == 0) device::arrive(counter_);
    target_ += ctas_;
  }
  RLV2V_DEVICE void enter() const {
    if (device::thread() == 0) device::wait_for(counter_, target_);
    device::sync_threads();
  }

 private:
  std::uint32_t* const counter_;
  const std::uint32_t ctas_;
  std::uint32_t target_ = 0;
};

// f(element, tap, value) for a run of weights in memory, taps fastest, by the lanes of a warp.
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
RLV2V_DEVICE void load_forward_weight(const PersistentForward& pass, const Place& place, int slice, const Conv& conv) {
  const int channels = pass.geometry.channels;
  const int taps = pass.geometry.kernel * pass.geometry.kernel;
  for (int row = place.warp; row < 4 * slice; row += kPersistentThreads / 32) {
    const int gate = row / slice;
    const int in_slice = row % slice;
    const int channel = place.slice * slice + in_slice;
    if (channel >= channels) continue;
    // So that a lane's sums are all four gates of its channels.
    const int column = (in_slice / 8 * 4 + gate) * 8 + in_slice % 8;
    const std::size_t first = (std::size_t(place.group) * 4 + gate) * channels + channel;
    for_weights(pass.w + first * channels * taps, channels, taps, place.lane,
                [&](int input, int tap, std::uint16_t value) { conv.set_weight(tap, input, column, value); });
  }
}

// What a thread knows of one pixel and two channels before the convolution, and what it makes of it afterwards.
template <class D>
struct ForwardCell {
  device::Floats c_before;

  // a: the pre-activations from x, which the convolution is added to.
  RLV2V_DEVICE void load(const PersistentForward& pass, const Channels& channels, std::size_t pixel,
                         const float* before, device::Floats (&a)[4]) {
    const int all = pass.geometry.channels;
    c_before = before ? channels.load(before) : device::Floats{};
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      a[gate] = widened<D>(channels.load(pass.a + (pixel * 4 + gate) * all + channels.first));
    }
  }

  RLV2V_DEVICE void finish(const PersistentForward& pass, const Channels& channels, std::size_t pixel,
                           const device::Floats (&a)[4]) const {
    const int all = pass.geometry.channels;
    device::Floats gates[4], c, h;
    RLV2V_UNROLL for (int e = 0; e < 2; ++e) {
      RLV2V_UNROLL for (int gate = 0; gate < 3; ++gate)
        gates[gate].of[e] = device::sigmoid(a[gate].of[e]);
      gates[3].of[e] = device::tanh(a[3].of[e]);
      c.of[e] = gates[1].of[e] * c_before.of[e] + gates[0].of[e] * gates[3].of[e];
      h.of[e] = gates[2].of[e] * device::tanh(c.of[e]);
    }
    channels.store(pass.cs + pixel * all + channels.first, c);
    channels.store(pass.hs + pixel * all + channels.first, narrowed<D>(h));
    if (!pass.gates) return;
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      channels.store(pass.gates + (pixel * 4 + gate) * all + channels.first, narrowed<device::Half>(gates[gate]));
    }
  }
};

// a_t += w * h_{t-1};  i, f, o = sigmoid;  g = tanh;  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)
template <class D, int kSlice>
RLV2V_DEVICE void forward_pass(const PersistentForward& pass) {
  constexpr int kAcross = kSlice / 8;  // warps beside each other, each of 8 channels with all four gates
  constexpr int kRows = kAcross;       // so that four warps cover 64 pixels
  const PersistentGeometry& geo = pass.geometry;
  const Place place(geo);
  Convolution<D, kRows, 4, kAcross> conv(geo, place, geo.channels);
  conv.clear_weight();
  load_forward_weight(pass, place, kSlice, conv);  // seen by all threads after the barrier in front of each product

  const Channels channels(geo, place.slice * kSlice + place.warp % kAcross * 8 + place.lane % 4 * 2);
  const std::size_t pixels = std::size_t(geo.batch) * geo.height * geo.width;
  const std::size_t state = place.group * pixels * geo.channels;
  StepBarrier barrier(geo, pass.counters, place.group);
  for (int t = 0; t < geo.steps; ++t) {
    const std::size_t frame = (std::size_t(place.group) * geo.steps + t) * pixels;
    const std::uint16_t* h_before = pass.h0 ? pass.h0 + state : nullptr;
    const float* c_before = pass.c0 ? pass.c0 + state : nullptr;
    if (t > 0) h_before = pass.hs + (frame - pixels) * geo.channels;
    if (t > 0) c_before = pass.cs + (frame - pixels) * geo.channels;
    for (int tile = place.cta; tile < geo.tiles; tile += geo.ctas) {
      int at[kRows][2];
      float sums[kRows][4][4] = {};
      ForwardCell<D> cells[kRows][2];
      conv.locate(tile, channels.count, at);
      RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          if (at[m][half] < 0) continue;
          const float* before =
              c_before ? c_before + std::size_t(at[m][half]) * geo.channels + channels.first : nullptr;
          device::Floats a[4];
          cells[m][half].load(pass, channels, frame + at[m][half], before, a);
          RLV2V_UNROLL for (int k = 0; k < 8; ++k)
            sums[m][k / 2][2 * half + k % 2] = a[k / 2].of[k % 2];
        }
      }
      if (h_before) {
        if (tile == place.cta) {
          if (t > 0) barrier.enter();
          conv.begin(tile, h_before);
        }
        conv.accumulate(sums, tile, tile + geo.ctas < geo.tiles ? tile + geo.ctas : -1, h_before);
      }
      RLV2V_UNROLL for (int m = 0; m < kRows; ++m) {
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          if (at[m][half] < 0) continue;
          device::Floats a[4];
          RLV2V_UNROLL for (int k = 0; k < 8; ++k)
            a[k / 2].of[k % 2] = sums[m][k / 2][2 * half + k % 2];
          cells[m][half].finish(pass, channels, frame + at[m][half], a);
        }
      }
    }
    if (t + 1 < geo.steps) barrier.leave();
  }
}

// The kernel turned by half a turn, inputs and outputs exchanged: the convolution's gradient of its input.
template <class Conv>
RLV2V_DEVICE void load_backward_weight(const PersistentBackward& pass, const Place& place, int slice,
                                       const Conv& conv) {
  const int channels = pass.geometry.channels;
  const int taps = pass.geometry.kernel * pass.geometry.kernel;
  const int first = place.slice * slice;
  const int count = channels - first < slice ? channels - first : slice;
  for (int input = place.warp; input < 4 * channels; input += kPersistentThreads / 32) {
    const std::size_t row = (std::size_t(place.group) * 4 * channels + input) * channels + first;
    for_weights(pass.w + row * taps, count, taps, place.lane, [&](int column, int tap, std::uint16_t value) {
      conv.set_weight(taps - 1 - tap, input, column, value);
    });
  }
}

template <class D>
struct BackwardCell {
  device::Halves gates[4];
  device::Floats c, c_before, dc;

  RLV2V_DEVICE void load(const PersistentBackward& pass, const Channels& channels, std::size_t pixel,
                         std::size_t in_state, const float* before, bool is_last_step) {
    const int all = pass.geometry.channels;
    const std::size_t at = pixel * all + channels.first;
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      gates[gate] = channels.load(pass.gates + (pixel * 4 + gate) * all + channels.first);
    }
    c = channels.load(pass.cs + at);
    c_before = before ? channels.load(before) : device::Floats{};
    dc = is_last_step ? device::Floats{} : channels.load(pass.dc0 + in_state);
    const device::Floats dcs = pass.dcs ? channels.load(pass.dcs + at) : device::Floats{};
    RLV2V_UNROLL for (int e = 0; e < 2; ++e)
      dc.of[e] += dcs.of[e];
  }

  RLV2V_DEVICE void finish(const PersistentBackward& pass, const Channels& channels, std::size_t pixel,
                           std::size_t in_state, const device::Floats& dh) const {
    const int all = pass.geometry.channels;
    device::Floats act[4], da[4], carry;
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      act[gate] = pass.activated ? widened<device::Half>(gates[gate]) : widened<D>(gates[gate]);
    }
    RLV2V_UNROLL for (int e = 0; e < 2; ++e) {
      if (!pass.activated) {
        RLV2V_UNROLL for (int gate = 0; gate < 3; ++gate)
          act[gate].of[e] = device::sigmoid(act[gate].of[e]);
        act[3].of[e] = device::tanh(act[3].of[e]);
      }
      const float i = act[0].of[e], f = act[1].of[e], o = act[2].of[e], g = act[3].of[e];
      const float tanh_c = device::tanh(c.of[e]);
      const float dc_now = dc.of[e] + dh.of[e] * o * (1.0f - tanh_c * tanh_c);
      da[0].of[e] = dc_now * g * i * (1.0f - i);
      da[1].of[e] = dc_now * c_before.of[e] * f * (1.0f - f);
      da[2].of[e] = dh.of[e] * tanh_c * o * (1.0f - o);
      da[3].of[e] = dc_now * i * (1.0f - g * g);
      carry.of[e] = dc_now * f;
    }
    RLV2V_UNROLL for (int gate = 0; gate < 4; ++gate) {
      channels.store(pass.da + (pixel * 4 + gate) * all + channels.first, narrowed<D>(da[gate]));
    }
    channels.store(pass.dc0 + in_state, carry);
  }
};

// dh = dhs_t + w^T * da_{t+1};  dc = dcs_t + carry + dh o (1 - tanh^2 c_t)
// da_i, da_f, da_o = dc g, dc c_{t-1}, dh tanh c_t through sigmoid';  da_g = dc i through tanh'
// carry = dc f;  after t = 0: dh0 = w^T * da_0
template <class D, int kSlice>
RLV2V_DEVICE void backward_pass(const PersistentBackward& pass) {
  constexpr int kColumns = kSlice / 8;
  const PersistentGeometry& geo = pass.geometry;
  const Place place(geo);
  Convolution<D, 1, kColumns, 1> conv(geo, place, 4 * geo.channels);
  conv.clear_weight();
  load_backward_weight(pass, place, kSlice, conv);

  const int first_channel = place.slice * kSlice + place.lane % 4 * 2;
  const std::size_t pixels = std::size_t(geo.batch) * geo.height * geo.width;
  const std::size_t state = place.group * pixels;
  const int last = pass.dh0 ? -1 : 0;
  StepBarrier barrier(geo, pass.counters, place.group);
  for (int t = geo.steps - 1; t >= last; --t) {
    const std::size_t frame = (std::size_t(place.group) * geo.steps + t) * pixels;  // at t = -1 never read
    const std::uint16_t* da_after = t + 1 < geo.steps ? pass.da + (frame + pixels) * 4 * geo.channels : nullptr;
    const float* c_before = pass.c0 ? pass.c0 + state * geo.channels : nullptr;
    if (t > 0) c_before = pass.cs + (frame - pixels) * geo.channels;
    for (int tile = place.cta; tile < geo.tiles; tile += geo.ctas) {
      int at[kColumns][1][2];
      float sums[1][kColumns][4] = {};
      BackwardCell<D> cells[kColumns][2];
      RLV2V_UNROLL for (int n = 0; n < kColumns; ++n) {
        const Channels channels(geo, first_channel + 8 * n);
        conv.locate(tile, channels.count, at[n]);
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          const int pixel = at[n][0][half];
          if (pixel < 0 || t < 0) continue;
          const std::size_t in_frame = std::size_t(pixel) * geo.channels + channels.first;
          const device::Floats dh = widened<D>(channels.load(pass.dhs + frame * geo.channels + in_frame));
          sums[0][n][2 * half] = dh.of[0];
          sums[0][n][2 * half + 1] = dh.of[1];
          cells[n][half].load(pass, channels, frame + pixel, state * geo.channels + in_frame,
                              c_before ? c_before + in_frame : nullptr, t == geo.steps - 1);
        }
      }
      if (da_after) {
        if (tile == place.cta) {
          barrier.enter();
          conv.begin(tile, da_after);
        }
        conv.accumulate(sums, tile, tile + geo.ctas < geo.tiles ? tile + geo.ctas : -1, da_after);
      }
      RLV2V_UNROLL for (int n = 0; n < kColumns; ++n) {
        const Channels channels(geo, first_channel + 8 * n);
        RLV2V_UNROLL for (int half = 0; half < 2; ++half) {
          const int pixel = at[n][0][half];
          if (pixel < 0) continue;
          const device::Floats dh{sums[0][n][2 * half], sums[0][n][2 * half + 1]};
          const std::size_t in_state = (state + pixel) * geo.channels + channels.first;
          if (t < 0) {
            channels.store(pass.dh0 + in_state, narrowed<D>(dh));
          } else {
            cells[n][half].finish(pass, channels, frame + pixel, in_state, dh);
          }
        }
      }
    }
    if (t > last) barrier.leave();
  }
}

}  // namespace rlv2v
