// The persistent ConvLSTM recurrence for NVIDIA GPUs: one cooperative launch runs all T steps of a pass, with the
// weight of the hidden state in shared memory throughout. 16-bit states, fp32 maths and cells; formulas in gates.h.
//
// The convolution of a step is a matrix product: rows are the B*H*W pixels of a group, K is k*k taps by the input
// channels (C forward, 4C backward), N the four gates of a slice of hidden channels (forward) or the slice itself
// (backward). A CTA owns a slice of a group, so that its part of the weight fits on chip, and every `ctas`-th tile of
// 64 pixels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace rlv2v {

constexpr int kPersistentThreads = 128;
constexpr int kTilePixels = 64;
constexpr int kMaxBlocksPerSm = 3;   // as many as the registers are limited for
constexpr int kCounterStride = 32;   // uint32 a group in the barrier's counters: one 128-byte line each

enum class Half16 { kFloat16, kBfloat16 };

struct ConvLstmShape {
  int groups, steps, batch, channels, height, width, kernel;
};

struct DeviceLimits {
  int sms;
  int shared_bytes;  // dynamic shared memory that one block may ask for; an SM has 1 KiB more
};

struct PersistentPlan {
  int slice;  // hidden channels of a CTA: 8 or 16
  int slices;
  int log_batch, log_height, log_width;  // a tile is 2^log images by rows by columns, 64 in all
  int tiles_height, tiles_width, tiles;
  int ctas;   // CTAs that share the tiles of one slice
  int chunk;  // segments of 16 input channels in a stage, of which there are two: 1, 2 or 4
  int weight_bytes, shared_bytes;
  int blocks;  // CTAs in all, resident at once
};

// The shape and the plan as the kernel gets them.
struct PersistentGeometry : ConvLstmShape, PersistentPlan {
  int patch_height, patch_width, patch_pixels;  // a tile with its halo
  std::uint32_t per_row, per_image;             // ceil(2^20 / d): x / d is x * per >> 20 within a patch
};

// Layouts: dense in the order group, step, image, row, column, channel; D is the 16-bit type; w (G,4C,C,k,k).
struct PersistentForward {
  PersistentGeometry geometry;
  const std::uint16_t* a;   // (G,T,B,4C,H,W) D
  const std::uint16_t* w;   // D
  const std::uint16_t* h0;  // (G,B,C,H,W) D, or null: zero
  const float* c0;          // (G,B,C,H,W), or null: zero
  std::uint16_t* hs;        // (G,T,B,C,H,W) D
  float* cs;                // (G,T,B,C,H,W)
  std::uint16_t* gates;     // (G,T,B,4C,H,W) fp16 after their activation, or null: not stored
  std::uint32_t* counters;  // (G, kCounterStride): run_persistent zeroes them
};

struct PersistentBackward {
  PersistentGeometry geometry;
  const std::uint16_t* dhs;    // (G,T,B,C,H,W) D
  const float* dcs;            // (G,T,B,C,H,W), or null: zero
  const std::uint16_t* gates;  // (G,T,B,4C,H,W): fp16 when activated, else pre-activations in D
  bool activated;
  const float* cs;          // (G,T,B,C,H,W)
  const float* c0;          // (G,B,C,H,W), or null: zero
  const std::uint16_t* w;   // D
  std::uint16_t* da;        // (G,T,B,4C,H,W) D
  std::uint16_t* dh0;       // (G,B,C,H,W) D, or null: not stored
  float* dc0;               // (G,B,C,H,W): the carry of dc, at the end the gradient of c0
  std::uint32_t* counters;  // (G, kCounterStride): run_persistent zeroes them
};

// Fills the plan and returns "", or returns why the shape does not fit the device. Needs no GPU.
std::string plan_persistent(const ConvLstmShape& shape, bool backward, const DeviceLimits& limits,
                            PersistentPlan& plan);
PersistentGeometry persistent_geometry(const ConvLstmShape& shape, const PersistentPlan& plan);

// Enqueues a pass, PersistentForward or PersistentBackward, on the stream (a cudaStream_t) and fills in its geometry.
// Throws std::invalid_argument if the shape does not fit the device, std::runtime_error if CUDA reports an error. A
// build without CUDA has no such function.
template <class Pass>
void run_persistent(const ConvLstmShape& shape, Half16 dtype, int device, Pass pass, void* stream);

}  // namespace rlv2v
