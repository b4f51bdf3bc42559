// The loops of kernels.h over explicit vectors of Width doubles; included once by the source of each instruction set, which
// is compiled with its flags. Everything is in an unnamed namespace: code of one set must not be linked into another.
//
//   x^a = 2^(a log2 x);   log2 x = e + (2 / ln 2) artanh((m - 1) / (m + 1)), m in [sqrt(1/2), sqrt(2));   2^f by its series
// Both series are cut below 1e-11 of their value: the results are rounded to f32.
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

  static inline Real log2(Real x) {
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

  static inline Real exp2(Real y) {
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
inline void each(const float* x, float* out, std::size_t count, const Map& map) {
  typedef float Single __attribute__((vector_size(Width * sizeof(float))));
  using Real = typename Vector<Width>::Real;
  std::size_t first = 0;
  for (; first + Width <= count; first += Width) {
    Single single;
    std::memcpy(&single, x + first, sizeof single);
    single = __builtin_convertvector(map(__builtin_convertvector(single, Real)), Single);
    std::memcpy(out + first, &single, sizeof single);
  }
  if (first == count) return;
  Single single = Single{} + 1.0F;
  std::memcpy(&single, x + first, (count - first) * sizeof(float));
  single = __builtin_convertvector(map(__builtin_convertvector(single, Real)), Single);
  std::memcpy(out + first, &single, (count - first) * sizeof(float));
}

template <std::size_t Width>
void power(const float* x, float* out, std::size_t count, double exponent) {
  using V = Vector<Width>;
  using Real = typename V::Real;
  each<Width>(x, out, count, [exponent](Real value) {
    const Real safe = value > 0.0 ? value : value * 0.0 + 1.0;
    const Real raised = exponent == 1.0 ? safe : V::exp2(exponent * V::log2(safe));
    return value > 0.0 ? raised : value * 0.0;
  });
}

template <std::size_t Width>
void weigh(const float* leaves, float* out, std::size_t count, double low, double exponent) {
  using V = Vector<Width>;
  using Real = typename V::Real;
  const Real least = V::log2(Real{} + low);
  each<Width>(leaves, out, count, [least, exponent](Real leaf) { return V::exp2(exponent * (least - V::log2(leaf))); });
}

void uniform(std::uint64_t key, std::uint64_t first, double* out, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) out[k] = uniform_draw(key, first + k);
}

}  // namespace
}  // namespace rlv2v
