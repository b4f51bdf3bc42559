// The pointwise half of a ConvLSTM step, fused: one pass forward and one backward instead of some ten each.
//
//   forward    a (+ a_h) -> i, f, o = sigmoid;  g = tanh;   c = f c_prev + i g;   h = o tanh(c)
//   backward   dh = dh1 + dh2;   tc = tanh(c);   dc = dc_out + carry + dh o (1 - tc^2)
//              da_i = dc g i(1-i);  da_f = dc c_prev f(1-f);  da_o = dh tc o(1-o);  da_g = dc i (1-g^2);  carry = dc f
// Source: Shi et al. 2015, arXiv:1506.04214, eq. 3 without peepholes. Sums, c, dc and the carry are f32.
//
// All arrays are dense, aligned to their elements only, and have `rows` rows: of `length` elements for h, c and their
// gradients, of 4 * length for pre-activations, gates and their gradients, gates i, f, o, g one after the other.
// Channels-last that is (B*H*W, C), channels-first (B, C*H*W).
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_type.h"

namespace rlv2v {

// Each element is read before it is written, so an output may be an input of equal element size, but not overlap it
// otherwise. Writing gates over a, and da over gates, is fastest: no cache line is fetched only to be written.
struct GatesForward {
  FloatType type;  // of a, h and their gradients
  std::int64_t rows, length;
  const void* a;        // (rows, 4 length) type
  const void* a_h;      // (rows, 4 length) type, added to a in f32; null: nothing to add
  const float* c_prev;  // (rows, length); null: zero
  void* h;              // (rows, length) type
  float* c;             // (rows, length)
  void* gates;          // (rows, 4 length) activated, f32 for kF32, else IEEE half; null: not stored
  int num_threads;
};

struct GatesBackward {
  FloatType type;
  bool activated;  // gates are as forward wrote them; else pre-activations in type
  std::int64_t rows, length;
  const void* dh1;        // (rows, length) type; null: zero
  const void* dh2;        // the same
  const float* dc_out;    // (rows, length); null: zero
  const float* carry_in;  // (rows, length); null: zero
  const void* gates;      // (rows, 4 length)
  const float* c;         // (rows, length)
  const float* c_prev;    // (rows, length); null: zero
  void* da;               // (rows, 4 length) type
  float* carry_out;       // (rows, length); null: not stored
  int num_threads;
};

// Both throw std::invalid_argument for a null that is not allowed, an unknown type, a negative or overflowing size, and
// num_threads < 1.
void gates_forward(const GatesForward& step);
void gates_backward(const GatesBackward& step);

// The share of one thread: elements [begin, end) of rows [first, last).
struct GatesBlock {
  std::size_t first, last, begin, end;
};

// The functions of one instruction set, by FloatType.
struct GatesKernels {
  void (*forward[3])(const GatesForward& step, const GatesBlock& block);
  void (*backward[3])(const GatesBackward& step, const GatesBlock& block);
};

}  // namespace rlv2v
