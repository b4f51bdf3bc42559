// All that the kernels use of a GPU: threads, barriers, asynchronous copies, the tensor cores' product, 16-bit floats.
// Under nvcc these are instructions; elsewhere tests/emulation.h runs the same kernels on fibers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define RLV2V_DEVICE __device__ __forceinline__
#define RLV2V_UNROLL _Pragma("unroll")
#define RLV2V_UNROLL_4 _Pragma("unroll 4")
#else
#include "tests/emulation.h"
#define RLV2V_DEVICE inline
#define RLV2V_UNROLL
#define RLV2V_UNROLL_4
#endif

namespace rlv2v::device {

// Aligned groups that one instruction loads or stores.
struct alignas(4) Halves {
  std::uint16_t v[2];
};
struct alignas(8) Floats {
  float v[2];
};
struct alignas(8) Words2 {
  std::uint32_t x, y;
};
struct alignas(16) Words4 {
  std::uint32_t x, y, z, w;
};

#ifdef __CUDACC__

struct Half {
  static __device__ __forceinline__ float to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ std::uint16_t from_float(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
};
struct Bfloat {
  static __device__ __forceinline__ float to_float(std::uint16_t bits) {
    return __uint_as_float(std::uint32_t{bits} << 16);
  }
  static __device__ __forceinline__ std::uint16_t from_float(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

RLV2V_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
RLV2V_DEVICE int block() { return static_cast<int>(blockIdx.x); }
RLV2V_DEVICE char* shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
template <class T>
RLV2V_DEVICE T load(const void* from) {
  return *static_cast<const T*>(from);
}
template <class T>
RLV2V_DEVICE void store(void* to, const T& value) {
  *static_cast<T*>(to) = value;
}
RLV2V_DEVICE void sync_threads() { __syncthreads(); }
// fp32: 1 / (1 + exp(-x)), with an absolute error of 1e-6, far below the rounding of 16-bit states.
RLV2V_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
RLV2V_DEVICE float tanh(float x) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }

// Loads from L2: memory that other CTAs wrote during this launch may be stale in L1.
RLV2V_DEVICE std::uint16_t load_l2(const std::uint16_t* from) { return __ldcg(from); }

// Copies 16 bytes to shared memory by way of L2, zeros if !valid; `from` must be readable either way.
RLV2V_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const auto target = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// Waits until all of this thread's copies are done.
RLV2V_DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Two halves of a barrier between CTAs, called by one thread of each: the CTAs that waited see what those that arrived
// had written. The fence also covers what other threads of the CTA wrote before its last sync_threads.
RLV2V_DEVICE void arrive(std::uint32_t* counter) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
RLV2V_DEVICE void wait_for(const std::uint32_t* counter, std::uint32_t count) {
  std::uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < count);
}

// d += a b for a warp: a (16,16), b (16,8), d (16,8) spread over its lanes as the PTX ISA lays out mma.m16n8k16.
template <class D>
RLV2V_DEVICE void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <>
RLV2V_DEVICE void multiply_add<Half>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
RLV2V_DEVICE void multiply_add<Bfloat>(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

}  // namespace rlv2v::device
