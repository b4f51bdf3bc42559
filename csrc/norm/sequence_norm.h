// What ends a block of a network, fused: residual, LeakyReLU, average pooling, and the causal sequence-wise
// normalisation of RL-V2V-GAN, section 3.4. Forward and backward read and write each frame once.
//
//   a = leaky(x + residual);   p = the mean of a over windows of pixels (those that fill no window are left out)
//   frame_mean, frame_square = the means of p and p^2 over the pixels of a frame
//   n_t = frames + t + 1;   mean_t = (frames mean + sum_{u<=t} frame_mean_u) / n_t;   square_t in the same way
//   y_t = (p_t - mean_t) scale_t + bias,   scale_t = weight / sqrt(max(square_t - mean_t^2, 0) + eps)
//
// A frame's spread is summed about a mean that was summed before, and corrected (Chan, Golub and LeVeque 1983): its
// moments are those of f64 to f32's rounding of the spread. All that follows from moments is f64.
//
// Arrays are dense: frames (steps, batch, height, width, channels) in `type`, moments and states f64 (steps, batch,
// channels), counts (steps, batch), a state before the first frame (batch, channels).
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_type.h"

namespace rlv2v {

struct NormShape {
  std::int64_t steps, batch, channels, height, width, pool_height, pool_width;
};

struct NormForward {
  FloatType type;
  NormShape shape;
  float slope;  // of the LeakyReLU below 0; 1: none
  double eps;
  const void* x;
  const void* residual;                          // null: zero
  const float *weight, *bias;                    // (channels); null: no normalisation
  const double *given_mean, *given_square;       // moments of the frames in place of their own; null: their own
  const double *frames, *mean, *square;          // the state: frames (batch); null: a video starts
  void* activated;                               // a; null: a is x, without residual, slope and windows
  void* pooled;                                  // p; null: p is a, with windows of one pixel
  void* y;                                       // with weight only, like what follows
  double *counts, *means, *squares;              // the states after every frame
  double *frame_mean, *frame_square;             // without weight only; null: not wanted
  int num_threads;
};

// A gradient that is given as null is zero; one to write that is null is not computed.
struct NormBackward {
  FloatType type;
  NormShape shape;
  float slope;
  double eps;
  const void* activated;                         // a, as for forward
  const void* values;                            // p, always
  const float* weight;                           // null: no normalisation
  const double* frames;                          // as for forward
  const double *means, *squares;                 // states as forward wrote them; without weight means are frame_mean
  const void* dy;                                // without weight the gradient of p
  const void* d_activated;
  const double *d_means, *d_squares;             // without weight of the frames' moments
  bool given;                                    // forward was given moments
  void* dx;                                      // of x and of the residual
  float *d_weight, *d_bias;                      // with weight only, like what follows
  double *d_mean, *d_square;                     // of the state; only if there was one
  double *d_given_mean, *d_given_square;         // only if `given`
  int num_threads;
};

// Both throw std::invalid_argument for a null that is not allowed, an unknown type, sizes below 1 (batch below 0) or
// too large, windows larger than a frame, and num_threads < 1. No result depends on the number of threads.
void norm_forward(const NormForward& call);
void norm_backward(const NormBackward& call);

// The functions of one instruction set, by FloatType: clips [first, last) of the batch. d_weight_bias is f64
// (batch, 2, channels).
struct NormKernels {
  void (*forward[kNumFloatTypes])(const NormForward& call, std::size_t first, std::size_t last);
  void (*backward[kNumFloatTypes])(const NormBackward& call, double* d_weight_bias, std::size_t first,
                                   std::size_t last);
};

}  // namespace rlv2v
