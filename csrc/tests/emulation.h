// Emulates a GPU for tests: every thread of every CTA is a fiber, all in one thread of the host, so a kernel's own
// source runs with all its CTAs resident. What the hardware leaves open turns out badly for the kernel:
//  - fibers run in random order, held back by barriers alone; under ThreadSanitizer each is a thread of its own, and
//  only
//    the barriers order their accesses, so a missing one is a reported race;
//  - an asynchronous copy fills its target with NaN at once and copies at the wait;
//  - shared memory starts as NaN; loads and stores of several bytes must be aligned;
//  - the tensor cores' fragments are spread over the lanes as the PTX ISA says for mma.m16n8k16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

namespace rlv2v::device {

struct Half {
  static float to_float(std::uint16_t bits);
  static std::uint16_t from_float(float value);
};
struct Bfloat {
  static float to_float(std::uint16_t bits);
  static std::uint16_t from_float(float value);
};

int thread();
int block();
char* shared();
void check_aligned(const void* address, std::size_t bytes);
void note_load(const void* from, std::size_t bytes);
void sync_threads();
void copy_async(void* to, const void* from, bool valid);
void copy_wait();
void arrive(std::uint32_t* counter);
void wait_for(const std::uint32_t* counter, std::uint32_t count);
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  float (*to_float)(std::uint16_t));

template <class D>
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  multiply_add(d, a, b0, b1, &D::to_float);
}
template <class T>
T load(const void* from) {
  check_aligned(from, alignof(T));
  note_load(from, sizeof(T));
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
void store(void* to, const T& value) {
  check_aligned(to, alignof(T));
  std::memcpy(to, &value, sizeof value);
}
inline std::uint16_t load_l2(const std::uint16_t* from) { return *from; }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float tanh(float x) { return 1.0f - 2.0f / (1.0f + std::exp(2.0f * x)); }

// Runs the kernel on `blocks` CTAs of `threads`; prints and exits with 1 if no fiber can continue. Returns how many of
// the warps' loads of 8 and 16 bytes a lane from shared memory had a bank conflict.
int run_grid(int blocks, int threads, int shared_bytes, std::uint64_t seed, const std::function<void()>& kernel);

}  // namespace rlv2v::device
