// The loops of gates.h over explicit vectors. The source of each instruction set includes this once, is compiled with
// its flags and brings a struct V of what differs. Everything is in an unnamed namespace: code of one set must not be
// linked into another.
//
//   2^f - 1 = f q(f) for f in [-1/2, 1/2], q a minimax polynomial;  s = 2^n, made in the exponent's bits
//   sigmoid(x) = 1 / (1 + s 2^f),                          n + f = -x / ln 2,  relative error of 2^f 9e-8
//   tanh(x) = m / (m + 2),  m = e^2x - 1 = s f q(f) + (s-1), n + f = 2x / ln 2,  relative error of f q(f) 1e-8
// Near 0, n is 0 and m = f q(f), so tanh keeps its relative precision there. Arguments are clamped to where sigmoid and
// tanh in f32 no longer change, which avoids infinities. NaN stays NaN.
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

// The type in which activated gates are stored. Half for Bf16 too: they lie in [-1, 1], where half has three more bits.
template <class T>
struct GateStorage {
  using Type = Half;
};
template <>
struct GateStorage<float> {
  using Type = float;
};

constexpr float kLog2E = 0x1.715476p+0F;

// 2^(n + f), n an integer and f in [-1/2, 1/2], as s = 2^n and f.
template <class Real>
struct Exp2Parts {
  Real s, f;
};

template <class V>
inline typename V::Real sigmoid(typename V::Real x) {
  using Real = typename V::Real;
  const Exp2Parts<Real> parts = V::exp2_parts(x, -kLog2E, 126.0F);
  Real q = V::fma(parts.f, V::set(0x1.5bb92ap-10F), V::set(0x1.3ceb6cp-7F));
  q = V::fma(q, parts.f, V::set(0x1.c6b75ap-5F));
  q = V::fma(q, parts.f, V::set(0x1.ebf9bap-3F));
  q = V::fma(q, parts.f, V::set(0x1.62e42ap-1F));
  q = V::fma(q, parts.f, V::set(1.0F));
  return V::reciprocal(V::fma(q, parts.s, V::set(1.0F)));
}

template <class V>
inline typename V::Real tanh(typename V::Real x) {
  using Real = typename V::Real;
  const Exp2Parts<Real> parts = V::exp2_parts(x, 2.0F * kLog2E, 27.0F);
  Real q = V::fma(parts.f, V::set(0x1.4308fap-13F), V::set(0x1.5f0878p-10F));
  q = V::fma(q, parts.f, V::set(0x1.3b2ba0p-7F));
  q = V::fma(q, parts.f, V::set(0x1.c6af6ep-5F));
  q = V::fma(q, parts.f, V::set(0x1.ebfbdep-3F));
  q = V::fma(q, parts.f, V::set(0x1.62e430p-1F));
  const Real m = V::fma(q * parts.f, parts.s, parts.s - V::set(1.0F));
  return V::quotient(m, m + V::set(2.0F));
}

template <class V>
struct GateValues {
  typename V::Real i, f, o, g;
};

// Loads and stores the four gates of one vector of elements, which lie a row's length apart.
template <class V, class Lanes>
struct StridedGates {
  template <class T>
  GateValues<V> load(const T* from) const {
    return {V::load(from, lanes), V::load(from + length, lanes), V::load(from + 2 * length, lanes),
            V::load(from + 3 * length, lanes)};
  }
  template <class T>
  void store(T* to, const GateValues<V>& x) const {
    V::store(to, x.i, lanes);
    V::store(to + length, x.f, lanes);
    V::store(to + 2 * length, x.o, lanes);
    V::store(to + 3 * length, x.g, lanes);
  }
  Lanes lanes;
  std::size_t length;
};

template <class V>
inline GateValues<V> activated(const GateValues<V>& a) {
  return {sigmoid<V>(a.i), sigmoid<V>(a.f), sigmoid<V>(a.o), tanh<V>(a.g)};
}

template <class V, class T>
struct Forward {
  using Real = typename V::Real;
  using Stored = typename GateStorage<T>::Type;

  explicit Forward(const GatesForward& step)
      : a(static_cast<const T*>(step.a)), a_h(static_cast<const T*>(step.a_h)), c_prev(step.c_prev),
        h(static_cast<T*>(step.h)), c(step.c), gates(static_cast<Stored*>(step.gates)) {}

  // Computes the vector whose first element is number `index` of a state and `gates_index` of the gates.
  template <class Layout>
  void operator()(const Layout& layout, std::size_t index, std::size_t gates_index) const {
    GateValues<V> x = layout.load(a + gates_index);
    if (a_h != nullptr) {
      const GateValues<V> b = layout.load(a_h + gates_index);
      x = {x.i + b.i, x.f + b.f, x.o + b.o, x.g + b.g};
    }
    x = activated<V>(x);
    Real next = x.i * x.g;
    if (c_prev != nullptr) next = V::fma(x.f, V::load(c_prev + index, layout.lanes), next);
    V::store(c + index, next, layout.lanes);
    V::store(h + index, x.o * tanh<V>(next), layout.lanes);
    if (gates != nullptr) layout.store(gates + gates_index, x);
  }

  const T* a;
  const T* a_h;
  const float* c_prev;
  T* h;
  float* c;
  Stored* gates;
};

template <class V, class T, bool Activated>
struct Backward {
  using Real = typename V::Real;
  using Stored = typename GateStorage<T>::Type;

  explicit Backward(const GatesBackward& step)
      : dh1(static_cast<const T*>(step.dh1)), dh2(static_cast<const T*>(step.dh2)), dc_out(step.dc_out),
        carry_in(step.carry_in), gates(step.gates), c(step.c), c_prev(step.c_prev), da(static_cast<T*>(step.da)),
        carry_out(step.carry_out) {}

  template <class Layout>
  void operator()(const Layout& layout, std::size_t index, std::size_t gates_index) const {
    const Real one = V::set(1.0F);
    const GateValues<V> x = load_gates(layout, gates_index);
    Real dh = V::set(0.0F);
    if (dh1 != nullptr) dh = V::load(dh1 + index, layout.lanes);
    if (dh2 != nullptr) dh = dh + V::load(dh2 + index, layout.lanes);
    const Real tc = tanh<V>(V::load(c + index, layout.lanes));
    Real dc = dh * x.o * V::fnmadd(tc, tc, one);
    if (dc_out != nullptr) dc = dc + V::load(dc_out + index, layout.lanes);
    if (carry_in != nullptr) dc = dc + V::load(carry_in + index, layout.lanes);
    Real df = V::set(0.0F);
    if (c_prev != nullptr) df = dc * V::load(c_prev + index, layout.lanes) * V::fnmadd(x.f, x.f, x.f);
    if (carry_out != nullptr) V::store(carry_out + index, dc * x.f, layout.lanes);
    const Real di = dc * x.g * V::fnmadd(x.i, x.i, x.i);
    const Real d_o = dh * tc * V::fnmadd(x.o, x.o, x.o);
    const Real dg = dc * x.i * V::fnmadd(x.g, x.g, one);
    layout.store(da + gates_index, GateValues<V>{di, df, d_o, dg});
  }

  template <class Layout>
  GateValues<V> load_gates(const Layout& layout, std::size_t index) const {
    if constexpr (Activated) return layout.load(static_cast<const Stored*>(gates) + index);
    else return activated<V>(layout.load(static_cast<const T*>(gates) + index));
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
inline void for_each_vector(const Step& step, std::size_t length, const GatesBlock& block) {
  if constexpr (V::kPacksRows) {
    if (2 * length <= V::kWidth) {  // such rows are never split
      const std::size_t rows_per_vector = V::kWidth / length;
      typename V::PackedRows rows(length);
      for (std::size_t row = block.first; row < block.last; row += rows_per_vector) {
        if (block.last - row < rows_per_vector) rows.set_count(block.last - row);
        step(rows, row * length, row * 4 * length);
      }
      return;
    }
  }
  for (std::size_t row = block.first; row < block.last; ++row) {
    const std::size_t state = row * length;
    const std::size_t gates = row * 4 * length;
    std::size_t k = block.begin;
    for (; k + V::kWidth <= block.end; k += V::kWidth) {
      step(StridedGates<V, typename V::AllLanes>{{}, length}, state + k, gates + k);
    }
    if (k < block.end) {
      step(StridedGates<V, typename V::SomeLanes>{typename V::SomeLanes(block.end - k), length}, state + k, gates + k);
    }
  }
}

template <class V, class T>
void forward(const GatesForward& step, const GatesBlock& block) {
  for_each_vector<V>(Forward<V, T>(step), static_cast<std::size_t>(step.length), block);
}

template <class V, class T>
void backward(const GatesBackward& step, const GatesBlock& block) {
  const auto length = static_cast<std::size_t>(step.length);
  if (step.activated) for_each_vector<V>(Backward<V, T, true>(step), length, block);
  else for_each_vector<V>(Backward<V, T, false>(step), length, block);
}

template <class V>
constexpr GatesKernels kernels_of(const char* name) {
  return {name,
          {forward<V, float>, forward<V, Bf16>, forward<V, Half>},
          {backward<V, float>, backward<V, Bf16>, backward<V, Half>}};
}

}  // namespace
}  // namespace rlv2v
