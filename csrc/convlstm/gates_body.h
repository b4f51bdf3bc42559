// The loops of gates.h over explicit vectors; included once by the source of each instruction set, which is compiled
// with its flags and brings a struct V of what differs. Everything is in an unnamed namespace: code of one set must
// not be linked into another.
//
//   2^f - 1 = f q(f) for f in [-1/2, 1/2], q a minimax polynomial;  s = 2^n, made in the exponent's bits
//   sigmoid(x) = 1 / (1 + s 2^f),                          n + f = -x / ln 2,  relative error of 2^f 9e-8
//   tanh(x) = m / (m + 2),  m = e^2x - 1 = s f q(f) + (s-1), n + f = 2x / ln 2,  relative error of f q(f) 1e-8
// Near 0 n is 0 and m = f q(f), so that tanh keeps its relative precision there.
// Arguments are clamped to where sigmoid or tanh in f32 no longer change, which keeps infinities away. NaN stays NaN.
#pragma once

#include "convlstm/gates.h"

namespace rlv2v {
namespace {

struct Bf16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

// What activated gates are kept in. Half for Bf16 too: they lie in [-1, 1], where half has three more bits.
template <class T>
struct KeptOf {
  using Type = Half;
};
template <>
struct KeptOf<float> {
  using Type = float;
};

constexpr float kLog2E = 0x1.715476p+0F;

// 2^(n + f), n whole and f in [-1/2, 1/2], as s = 2^n and f.
template <class Real>
struct Power {
  Real s, f;
};

template <class V>
inline typename V::Real sigmoid(typename V::Real x) {
  using Real = typename V::Real;
  const Power<Real> power = V::power(x, -kLog2E, 126.0F);
  Real q = V::fma(power.f, V::set(0x1.5bb92ap-10F), V::set(0x1.3ceb6cp-7F));
  q = V::fma(q, power.f, V::set(0x1.c6b75ap-5F));
  q = V::fma(q, power.f, V::set(0x1.ebf9bap-3F));
  q = V::fma(q, power.f, V::set(0x1.62e42ap-1F));
  q = V::fma(q, power.f, V::set(1.0F));
  return V::inverse(V::fma(q, power.s, V::set(1.0F)));
}

template <class V>
inline typename V::Real tanh(typename V::Real x) {
  using Real = typename V::Real;
  const Power<Real> power = V::power(x, 2.0F * kLog2E, 27.0F);
  Real q = V::fma(power.f, V::set(0x1.4308fap-13F), V::set(0x1.5f0878p-10F));
  q = V::fma(q, power.f, V::set(0x1.3b2ba0p-7F));
  q = V::fma(q, power.f, V::set(0x1.c6af6ep-5F));
  q = V::fma(q, power.f, V::set(0x1.ebfbdep-3F));
  q = V::fma(q, power.f, V::set(0x1.62e430p-1F));
  const Real m = V::fma(q * power.f, power.s, power.s - V::set(1.0F));
  return V::quotient(m, m + V::set(2.0F));
}

template <class V>
struct Four {
  typename V::Real i, f, o, g;
};

// Where the four gates of one vector of elements are: a row's length apart.
template <class V, class Lanes>
struct Apart {
  template <class T>
  Four<V> load(const T* from) const {
    return {V::load(from, lanes), V::load(from + length, lanes), V::load(from + 2 * length, lanes),
            V::load(from + 3 * length, lanes)};
  }
  template <class T>
  void store(T* to, const Four<V>& x) const {
    V::store(to, x.i, lanes);
    V::store(to + length, x.f, lanes);
    V::store(to + 2 * length, x.o, lanes);
    V::store(to + 3 * length, x.g, lanes);
  }
  Lanes lanes;
  std::size_t length;
};

template <class V>
inline Four<V> activated(const Four<V>& a) {
  return {sigmoid<V>(a.i), sigmoid<V>(a.f), sigmoid<V>(a.o), tanh<V>(a.g)};
}

template <class V, class T>
struct Forward {
  using Real = typename V::Real;
  using Kept = typename KeptOf<T>::Type;

  explicit Forward(const GatesForward& step)
      : a(static_cast<const T*>(step.a)), a_h(static_cast<const T*>(step.a_h)), c_prev(step.c_prev),
        h(static_cast<T*>(step.h)), c(step.c), gates(static_cast<Kept*>(step.gates)) {}

  // The vector whose first element is number `at` of a state, `at_gates` of the gates.
  template <class Place>
  void operator()(const Place& place, std::size_t at, std::size_t at_gates) const {
    Four<V> x = place.load(a + at_gates);
    if (a_h != nullptr) {
      const Four<V> more = place.load(a_h + at_gates);
      x = {x.i + more.i, x.f + more.f, x.o + more.o, x.g + more.g};
    }
    x = activated<V>(x);
    Real next = x.i * x.g;
    if (c_prev != nullptr) next = V::fma(x.f, V::load(c_prev + at, place.lanes), next);
    V::store(c + at, next, place.lanes);
    V::store(h + at, x.o * tanh<V>(next), place.lanes);
    if (gates != nullptr) place.store(gates + at_gates, x);
  }

  const T* a;
  const T* a_h;
  const float* c_prev;
  T* h;
  float* c;
  Kept* gates;
};

template <class V, class T, bool Activated>
struct Backward {
  using Real = typename V::Real;
  using Kept = typename KeptOf<T>::Type;

  explicit Backward(const GatesBackward& step)
      : dh1(static_cast<const T*>(step.dh1)), dh2(static_cast<const T*>(step.dh2)), dc_out(step.dc_out),
        carry_in(step.carry_in), gates(step.gates), c(step.c), c_prev(step.c_prev), da(static_cast<T*>(step.da)),
        carry_out(step.carry_out) {}

  template <class Place>
  void operator()(const Place& place, std::size_t at, std::size_t at_gates) const {
    const Real one = V::set(1.0F);
    const Four<V> x = gates_at(place, at_gates);
    Real dh = V::set(0.0F);
    if (dh1 != nullptr) dh = V::load(dh1 + at, place.lanes);
    if (dh2 != nullptr) dh = dh + V::load(dh2 + at, place.lanes);
    const Real tc = tanh<V>(V::load(c + at, place.lanes));
    Real dc = dh * x.o * V::less_product(one, tc, tc);
    if (dc_out != nullptr) dc = dc + V::load(dc_out + at, place.lanes);
    if (carry_in != nullptr) dc = dc + V::load(carry_in + at, place.lanes);
    Real df = V::set(0.0F);
    if (c_prev != nullptr) df = dc * V::load(c_prev + at, place.lanes) * V::less_product(x.f, x.f, x.f);
    if (carry_out != nullptr) V::store(carry_out + at, dc * x.f, place.lanes);
    const Real di = dc * x.g * V::less_product(x.i, x.i, x.i);
    const Real d_o = dh * tc * V::less_product(x.o, x.o, x.o);
    const Real dg = dc * x.i * V::less_product(one, x.g, x.g);
    place.store(da + at_gates, Four<V>{di, df, d_o, dg});
  }

  template <class Place>
  Four<V> gates_at(const Place& place, std::size_t at) const {
    if constexpr (Activated) return place.load(static_cast<const Kept*>(gates) + at);
    else return activated<V>(place.load(static_cast<const T*>(gates) + at));
  }

  const T* dh1;
  const T* dh2;
  const float* dc_out;
  const float* carry_in;
  const void* gates;
  const float* c;
  const float* c_prev;
  T* da;
  float* carry_out;
};

template <class V, class Step>
inline void each_vector(const Step& step, std::size_t length, const GatesBlock& block) {
  if constexpr (V::kPacksRows) {
    if (2 * length <= V::kWidth) {  // such rows are never split
      const std::size_t at_once = V::kWidth / length;
      typename V::Rows rows(length);
      for (std::size_t row = block.first; row < block.last; row += at_once) {
        if (block.last - row < at_once) rows.set_count(block.last - row);
        step(rows, row * length, row * 4 * length);
      }
      return;
    }
  }
  for (std::size_t row = block.first; row < block.last; ++row) {
    const std::size_t state = row * length;
    const std::size_t gates = row * 4 * length;
    std::size_t at = block.begin;
    for (; at + V::kWidth <= block.end; at += V::kWidth) {
      step(Apart<V, typename V::All>{{}, length}, state + at, gates + at);
    }
    if (at < block.end) {
      step(Apart<V, typename V::Some>{typename V::Some(block.end - at), length}, state + at, gates + at);
    }
  }
}

template <class V, class T>
void forward(const GatesForward& step, const GatesBlock& block) {
  each_vector<V>(Forward<V, T>(step), static_cast<std::size_t>(step.length), block);
}

template <class V, class T>
void backward(const GatesBackward& step, const GatesBlock& block) {
  const auto length = static_cast<std::size_t>(step.length);
  if (step.activated) each_vector<V>(Backward<V, T, true>(step), length, block);
  else each_vector<V>(Backward<V, T, false>(step), length, block);
}

template <class V>
constexpr GatesKernels kernels_of(const char* name) {
  return {name,
          {forward<V, float>, forward<V, Bf16>, forward<V, Half>},
          {backward<V, float>, backward<V, Bf16>, backward<V, Half>}};
}

}  // namespace
}  // namespace rlv2v
