// The loops of kernels.h. The source of each instruction set includes this once, is compiled with its flags, and brings
// a struct V: eight f64 (Doubles) with load, scan, total, above, ..., and kWidth, the number of f64 in a register.
// Everything is in an unnamed namespace: code of one set must not be linked into another.
//
//   x^a = 2^(a log2 x);   log2 x = e + (2 / ln 2) artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2));   2^f by its
//   series
// Both series are cut below 1e-11 of their value, since the results are rounded to f32.
#pragma once

#include <cstring>

#include "replay/draws.h"
#include "replay/kernels.h"

namespace rlv2v {
namespace {

constexpr double kInverseFactorial[] = {1.0,       1.0,       1.0 / 2,    1.0 / 6,     1.0 / 24,
                                        1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880};

template <std::size_t Width>
struct Vector {
  typedef double Real __attribute__((vector_size(Width * sizeof(double))));
  typedef std::int64_t Int __attribute__((vector_size(Width * sizeof(double))));
  typedef std::uint64_t Bits __attribute__((vector_size(Width * sizeof(double))));

  static Real log2(Real x) {
    constexpr std::uint64_t kRootHalf = 0x3fe6a09e667f3bcdULL;  // bits of sqrt(1/2)
    constexpr std::uint64_t kBias = 2048;                       // keeps the shifted exponent positive
    const Bits shifted = (Bits)x - kRootHalf + (kBias << 52);
    const Bits exponent = shifted >> 52;
    const Real m = (Real)((Bits)x - ((exponent - kBias) << 52));
    // exponent as a double: below 2^52 it is the mantissa of 2^52 + exponent.
    const Real e = (Real)(exponent + 0x4330000000000000ULL) - (0x1.0p52 + static_cast<double>(kBias));
    const Real s = (m - 1.0) / (m + 1.0);
    const Real q = s * s;
    Real sum = q * 0.0 + 1.0 / 13.0;
    for (int k = 11; k >= 1; k -= 2) sum = sum * q + 1.0 / static_cast<double>(k);
    return e + s * sum * 2.8853900817779268;  // 2 / ln 2
  }

  static Real exp2(Real y) {
    constexpr double kRound = 0x1.8p52;  // adding it rounds to the nearest integer, held in the low bits
    const Real rounded = y + kRound;
    const Real x = (y - (rounded - kRound)) * 0.69314718055994531;
    Real sum = x * 0.0 + kInverseFactorial[9];
    for (int k = 8; k >= 0; --k) sum = sum * x + kInverseFactorial[k];
    return (Real)((Bits)sum + ((Bits)rounded << 52));
  }
};

// out[k] = map(x[k]) in f64 for all k, the last vector padded with ones.
template <std::size_t Width, class Map>
inline void map_all(const float* x, float* out, std::size_t count, const Map& map) {
  typedef float Single __attribute__((vector_size(Width * sizeof(float))));
  using Real = typename Vector<Width>::Real;
  const auto map_some = [&](std::size_t first, std::size_t bytes) __attribute__((always_inline)) {
    Single single = Single{} + 1.0F;
    std::memcpy(&single, x + first, bytes);
    single = __builtin_convertvector(map(__builtin_convertvector(single, Real)), Single);
    std::memcpy(out + first, &single, bytes);
  };
  std::size_t first = 0;
  for (; first + Width <= count; first += Width) map_some(first, sizeof(Single));
  if (first < count) map_some(first, (count - first) * sizeof(float));
}

template <std::size_t Width>
void power(const float* x, float* out, std::size_t count, double exponent) {
  using V = Vector<Width>;
  using Real = typename V::Real;
  map_all<Width>(x, out, count, [exponent](Real value) {
    const Real safe = value > 0.0 ? value : value * 0.0 + 1.0;
    const Real raised = exponent == 1.0 ? safe : V::exp2(exponent * V::log2(safe));
    return value > 0.0 ? raised : value * 0.0;
  });
}

template <std::size_t Width>
void importance_weights(const float* leaves, float* out, std::size_t count, double low, double exponent) {
  using V = Vector<Width>;
  using Real = typename V::Real;
  const Real log_low = V::log2(Real{} + low);
  map_all<Width>(leaves, out, count,
                 [log_low, exponent](Real leaf) { return V::exp2(exponent * (log_low - V::log2(leaf))); });
}

void uniform(std::uint64_t key, std::uint64_t first, double* out, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) out[k] = uniform_draw(key, first + k);
}

// The number of the lowest bit of past, or else of the highest of positive.
inline std::uint32_t select(std::uint32_t past, std::uint32_t positive) {
  return static_cast<std::uint32_t>(past != 0 ? __builtin_ctz(past) : 31 - __builtin_clz(positive));
}

template <class V>
void descend(const double* sums, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
             std::size_t count) {
  const auto* next = static_cast<const unsigned char*>(below);
  for (std::size_t k = 0; k < count; ++k) {
    const typename V::Doubles children = V::load(sums + std::size_t{node[k]} * kFanout);
    const typename V::Doubles scan = V::scan(children);
    const std::uint32_t positive = V::above(children, 0.0);
    const std::uint32_t chosen = select(V::above(scan, point[k]) & positive, positive);
    point[k] -= V::sum_before(scan, chosen);
    node[k] = node[k] * static_cast<std::uint32_t>(kFanout) + chosen;
    __builtin_prefetch(next + std::size_t{node[k]} * below_bytes);
  }
}

template <class V>
void select_leaf(const float* leaves, const double* point, std::uint32_t* index, float* value, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{index[k]} * kLeafGroup;
    const typename V::Doubles first = V::load(group);
    const typename V::Doubles last = V::load(group + 8);
    const typename V::Doubles first_scan = V::scan(first);
    const typename V::Doubles last_scan = V::add(V::scan(last), V::broadcast_last(first_scan));
    const std::uint32_t positive = V::above(first, 0.0) | V::above(last, 0.0) << 8U;
    const std::uint32_t past = V::above(first_scan, point[k]) | V::above(last_scan, point[k]) << 8U;
    const std::uint32_t chosen = select(past & positive, positive);
    index[k] = index[k] * static_cast<std::uint32_t>(kLeafGroup) + chosen;
    value[k] = group[chosen];
  }
}

template <class V>
void sum_leaves(const float* leaves, const std::uint32_t* groups, std::size_t count, double* sums,
                std::uint32_t* min_keys) {
  for (std::size_t k = 0; k < count; ++k) {
    const float* group = leaves + std::size_t{groups[k]} * kLeafGroup;
    sums[groups[k]] = V::total(V::load(group + 8)) + V::total(V::load(group));
    min_keys[groups[k]] = V::highest_key(group);
  }
}

template <class V>
void sum_nodes(const double* sums_below, const std::uint32_t* min_keys_below, const std::uint32_t* nodes,
               std::size_t count, double* sums, std::uint32_t* min_keys) {
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t first = std::size_t{nodes[k]} * kFanout;
    sums[nodes[k]] = V::total(V::load(sums_below + first));
    min_keys[nodes[k]] = V::highest(min_keys_below + first);
  }
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
  return {name,           power<V::kWidth>, importance_weights<V::kWidth>, uniform,   descend<V>,
          select_leaf<V>, sum_leaves<V>,    sum_nodes<V>,                  V::stream, V::fence};
}

}  // namespace
}  // namespace rlv2v
