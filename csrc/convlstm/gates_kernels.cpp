// The kernels of gates.h. The build compiles this file once for each instruction set, with its flags and the name
// RLV2V_KERNELS. Products and sums may be fused where the set can. Everything else is in an unnamed
// namespace: code of one set must not be linked into another.
//
//   2^f - 1 = f q(f) for f in [-1/2, 1/2], q a minimax polynomial;  s = 2^n, made in the exponent's bits
//   sigmoid(x) = 1 / (1 + s 2^f),                          n + f = -x / ln 2,  relative error of 2^f 9e-8
//   tanh(x) = m / (m + 2),  m = e^2x - 1 = s f q(f) + (s-1), n + f = 2x / ln 2,  relative error of f q(f) 1e-8
// Near 0, n is 0 and m = f q(f), so tanh keeps its relative precision there. Arguments are clamped to where sigmoid and
// tanh in f32 no longer change, which avoids infinities. NaN stays NaN.
#include <type_traits>

#include "convlstm/gates.h"
#include "vector.h"

namespace rlv2v {
namespace {

// The type in which activated gates are stored. Half for Bf16 too: they lie in [-1, 1], where half has three more bits.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, float>, float, Half>;

constexpr float kLog2E = 0x1.715476p+0F;

// 2^(n + f), n an integer and f in [-1/2, 1/2], as s = 2^n and f.
struct Exp2Parts {
  Real s, f;
};

// Splits x scale into n + f, clamped to +-max.
inline Exp2Parts exp2_parts(Real x, float scale, float max) {
#ifdef __AVX512F__
  // For -inf, s and f are 0. Of two operands min returns the second if one is NaN.
  const Real y = _mm512_min_ps(set(max), x * scale);
  const Real f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {_mm512_scalef_ps(set(1.0F), y - f), f};
#else
  constexpr float kMagic = 0x1.8p+23F + 127.0F;  // adding it rounds to n and leaves n + 127 in the low bits
  const Real y = clamped(x, max / (scale < 0.0F ? -scale : scale));
  const Real shifted = y * scale + kMagic;
  return {(Real)((Bits)shifted << 23U), y * scale + (kMagic - shifted)};
#endif
}

inline Real sigmoid(Real x) {
  const Exp2Parts parts = exp2_parts(x, -kLog2E, 126.0F);
  Real q = parts.f * 0x1.5bb92ap-10F + 0x1.3ceb6cp-7F;
  q = q * parts.f + 0x1.c6b75ap-5F;
  q = q * parts.f + 0x1.ebf9bap-3F;
  q = q * parts.f + 0x1.62e42ap-1F;
  q = q * parts.f + 1.0F;
  return quotient(set(1.0F), q * parts.s + 1.0F);
}

inline Real tanh(Real x) {
  const Exp2Parts parts = exp2_parts(x, 2.0F * kLog2E, 27.0F);
  Real q = parts.f * 0x1.4308fap-13F + 0x1.5f0878p-10F;
  q = q * parts.f + 0x1.3b2ba0p-7F;
  q = q * parts.f + 0x1.c6af6ep-5F;
  q = q * parts.f + 0x1.ebfbdep-3F;
  q = q * parts.f + 0x1.62e430p-1F;
  const Real m = q * parts.f * parts.s + (parts.s - 1.0F);
  return quotient(m, m + 2.0F);
}

struct GateValues {
  Real i, f, o, g;
};

// Loads and stores the four gates of one vector of elements, which lie a row's length apart.
template <class Lanes>
struct StridedGates {
  template <class T>
  GateValues load(const T* from) const {
    return {rlv2v::load(from, lanes), rlv2v::load(from + length, lanes), rlv2v::load(from + 2 * length, lanes),
            rlv2v::load(from + 3 * length, lanes)};
  }
  template <class T>
  void store(T* to, const GateValues& x) const {
    rlv2v::store(to, x.i, lanes);
    rlv2v::store(to + length, x.f, lanes);
    rlv2v::store(to + 2 * length, x.o, lanes);
    rlv2v::store(to + 3 * length, x.g, lanes);
  }
  Lanes lanes;
  std::size_t length;
};

inline GateValues activated(const GateValues& a) {
  return {sigmoid(a.i), sigmoid(a.f), sigmoid(a.o), tanh(a.g)};
}

// Computes the vector whose first element is number `index` of a state and `gates_index` of the gates.
template <class T>
struct Forward {
  template <class Layout>
  void operator()(const Layout& layout, std::size_t index, std::size_t gates_index) const {
    GateValues x = layout.load(static_cast<const T*>(step.a) + gates_index);
    if (step.a_h != nullptr) {
      const GateValues b = layout.load(static_cast<const T*>(step.a_h) + gates_index);
      x = {x.i + b.i, x.f + b.f, x.o + b.o, x.g + b.g};
    }
    x = activated(x);
    Real next = x.i * x.g;
    if (step.c_prev != nullptr) next = x.f * load(step.c_prev + index, layout.lanes) + next;
    store(step.c + index, next, layout.lanes);
    store(static_cast<T*>(step.h) + index, x.o * tanh(next), layout.lanes);
    if (step.gates != nullptr) layout.store(static_cast<Stored<T>*>(step.gates) + gates_index, x);
  }
  GatesForward step;
};

template <class T, bool Activated>
struct Backward {
  explicit Backward(const GatesBackward& step)
      : dh1(static_cast<const T*>(step.dh1)), dh2(static_cast<const T*>(step.dh2)), dc_out(step.dc_out),
        carry_in(step.carry_in), gates(step.gates), c(step.c), c_prev(step.c_prev), da(static_cast<T*>(step.da)),
        carry_out(step.carry_out) {}

  template <class Layout>
  void operator()(const Layout& layout, std::size_t index, std::size_t gates_index) const {
    const GateValues x = load_gates(layout, gates_index);
    Real dh{};
    if (dh1 != nullptr) dh = load(dh1 + index, layout.lanes);
    if (dh2 != nullptr) dh = dh + load(dh2 + index, layout.lanes);
    const Real tc = tanh(load(c + index, layout.lanes));
    Real dc = dh * x.o * (1.0F - tc * tc);
    if (dc_out != nullptr) dc = dc + load(dc_out + index, layout.lanes);
    if (carry_in != nullptr) dc = dc + load(carry_in + index, layout.lanes);
    Real df{};
    if (c_prev != nullptr) df = dc * load(c_prev + index, layout.lanes) * (x.f - x.f * x.f);
    if (carry_out != nullptr) store(carry_out + index, dc * x.f, layout.lanes);
    const Real di = dc * x.g * (x.i - x.i * x.i);
    const Real d_o = dh * tc * (x.o - x.o * x.o);
    const Real dg = dc * x.i * (1.0F - x.g * x.g);
    layout.store(da + gates_index, GateValues{di, df, d_o, dg});
  }

  template <class Layout>
  GateValues load_gates(const Layout& layout, std::size_t index) const {
    if constexpr (Activated) return layout.load(static_cast<const Stored<T>*>(gates) + index);
    else return activated(layout.load(static_cast<const T*>(gates) + index));
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

#ifdef __AVX512F__
// Packs several rows of at most 8 elements into one vector. Their gates fill up to four vectors in memory: lane k of
// gate n is element from[n][k] of those, and element k of vector v of those is lane to[v][k] of all gates in a row.
struct PackedRows {
  explicit PackedRows(std::size_t row_length) : lanes(0), length(row_length) {
    alignas(64) std::int32_t all_from[4][kWidth] = {};
    alignas(64) std::int32_t all_to[4 * kWidth] = {};
    std::int32_t next = 0;
    for (std::size_t first = 0; first + length <= kWidth; first += length) {
      for (std::size_t gate = 0; gate < 4; ++gate) {
        for (std::size_t k = first; k < first + length; ++k, ++next) {
          all_from[gate][k] = next;
          all_to[next] = static_cast<std::int32_t>(gate * kWidth + k);
        }
      }
    }
    for (std::size_t k = 0; k < 4; ++k) {
      from[k] = Permutation(all_from[k]);
      to[k] = Permutation(all_to + k * kWidth);
    }
    set_count(kWidth / length);
  }

  void set_count(std::size_t rows) {
    lanes = SomeLanes(rows * length);
    for (std::size_t k = 0; k < 4; ++k) {
      const std::size_t left = 4 * rows * length > k * kWidth ? 4 * rows * length - k * kWidth : 0;
      parts[k] = SomeLanes(left < kWidth ? left : kWidth);
    }
  }

  template <class T>
  GateValues load(const T* gates) const {
    const Real all[4] = {rlv2v::load(gates, parts[0]), rlv2v::load(gates + kWidth, parts[1]),
                         rlv2v::load(gates + 2 * kWidth, parts[2]), rlv2v::load(gates + 3 * kWidth, parts[3])};
    return {from[0].apply(all), from[1].apply(all), from[2].apply(all), from[3].apply(all)};
  }
  template <class T>
  void store(T* gates, const GateValues& x) const {
    const Real all[4] = {x.i, x.f, x.o, x.g};
    for (std::size_t k = 0; k < 4; ++k) rlv2v::store(gates + k * kWidth, to[k].apply(all), parts[k]);
  }

  // Selects 16 of the 64 elements of four vectors.
  struct Permutation {
    Permutation() : index(_mm512_setzero_si512()), last_half(0) {}
    explicit Permutation(const std::int32_t* numbers)
        : index(_mm512_load_si512(numbers)), last_half(_mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(2 * kWidth))) {}
    Real apply(const Real* all) const {
      return _mm512_mask_blend_ps(last_half, _mm512_permutex2var_ps(all[0], index, all[1]),
                                  _mm512_permutex2var_ps(all[2], index, all[3]));
    }
    __m512i index;  // the instruction reads five bits of each
    __mmask16 last_half;
  };

  SomeLanes lanes;
  std::size_t length;
  SomeLanes parts[4] = {SomeLanes(0), SomeLanes(0), SomeLanes(0), SomeLanes(0)};
  Permutation from[4];
  Permutation to[4];
};
#endif

template <class Step>
inline void for_each_vector(const Step& step, std::size_t length, const GatesBlock& block) {
#ifdef __AVX512F__
  if (2 * length <= kWidth) {  // such rows are never split
    const std::size_t rows_per_vector = kWidth / length;
    PackedRows rows(length);
    for (std::size_t row = block.first; row < block.last; row += rows_per_vector) {
      if (block.last - row < rows_per_vector) rows.set_count(block.last - row);
      step(rows, row * length, row * 4 * length);
    }
    return;
  }
#endif
  for (std::size_t row = block.first; row < block.last; ++row) {
    const std::size_t state = row * length;
    const std::size_t gates = row * 4 * length;
    std::size_t k = block.begin;
    for (; k + kWidth <= block.end; k += kWidth) {
      step(StridedGates<AllLanes>{{}, length}, state + k, gates + k);
    }
    if (k < block.end) {
      step(StridedGates<SomeLanes>{SomeLanes(block.end - k), length}, state + k, gates + k);
    }
  }
}

template <class T>
void forward(const GatesForward& step, const GatesBlock& block) {
  for_each_vector(Forward<T>{step}, static_cast<std::size_t>(step.length), block);
}

template <class T>
void backward(const GatesBackward& step, const GatesBlock& block) {
  const auto length = static_cast<std::size_t>(step.length);
  if (step.activated) for_each_vector(Backward<T, true>(step), length, block);
  else for_each_vector(Backward<T, false>(step), length, block);
}

}  // namespace

extern const GatesKernels RLV2V_KERNELS;
const GatesKernels RLV2V_KERNELS{{forward<float>, forward<Bf16>, forward<Half>},
                                 {backward<float>, backward<Bf16>, backward<Half>}};

}  // namespace rlv2v
