// The types of floating-point numbers that kernels read and write; they compute in f32 and wider.
#pragma once

namespace rlv2v {

enum class FloatType : int { kF32 = 0, kBf16 = 1, kF16 = 2 };
constexpr int kNumFloatTypes = 3;

}  // namespace rlv2v
