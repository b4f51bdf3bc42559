// The sequence-wise normalisation in rlv2v._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "address.h"
#include "norm/sequence_norm.h"

namespace py = pybind11;

namespace rlv2v {

namespace {

using Sizes = std::array<std::int64_t, 7>;

NormShape shape_of(const Sizes& n) { return {n[0], n[1], n[2], n[3], n[4], n[5], n[6]}; }

void forward(int dtype, const Sizes& sizes, float slope, double eps, int num_threads, Address x, Address residual,
             Address weight, Address bias, Address given_mean, Address given_square, Address frames, Address mean,
             Address square, Address activated, Address pooled, Address y, Address counts, Address means,
             Address squares, Address frame_mean, Address frame_square) {
  norm_forward({static_cast<FloatType>(dtype), shape_of(sizes), slope, eps, Pointer{x}, Pointer{residual},
                Pointer{weight}, Pointer{bias}, Pointer{given_mean}, Pointer{given_square}, Pointer{frames},
                Pointer{mean}, Pointer{square}, Pointer{activated}, Pointer{pooled}, Pointer{y}, Pointer{counts},
                Pointer{means}, Pointer{squares}, Pointer{frame_mean}, Pointer{frame_square}, num_threads});
}

void backward(int dtype, const Sizes& sizes, float slope, double eps, bool given, int num_threads, Address activated,
              Address values, Address weight, Address frames, Address means, Address squares, Address dy,
              Address d_activated, Address d_means, Address d_squares, Address dx, Address d_weight, Address d_bias,
              Address d_mean, Address d_square, Address d_given_mean, Address d_given_square) {
  norm_backward({static_cast<FloatType>(dtype), shape_of(sizes), slope, eps, Pointer{activated}, Pointer{values},
                 Pointer{weight}, Pointer{frames}, Pointer{means}, Pointer{squares}, Pointer{dy}, Pointer{d_activated},
                 Pointer{d_means}, Pointer{d_squares}, given, Pointer{dx}, Pointer{d_weight}, Pointer{d_bias},
                 Pointer{d_mean}, Pointer{d_square}, Pointer{d_given_mean}, Pointer{d_given_square}, num_threads});
}

}  // namespace

void bind_norm(py::module_& m) {
  using namespace py::literals;
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.def("norm_forward", &forward, ReleaseGil(), "dtype"_a, "sizes"_a, "slope"_a, "eps"_a, "num_threads"_a,
        py::kw_only(), "x"_a = 0, "residual"_a = 0, "weight"_a = 0, "bias"_a = 0, "given_mean"_a = 0,
        "given_square"_a = 0, "frames"_a = 0, "mean"_a = 0, "square"_a = 0, "activated"_a = 0, "pooled"_a = 0,
        "y"_a = 0, "counts"_a = 0, "means"_a = 0, "squares"_a = 0, "frame_mean"_a = 0, "frame_square"_a = 0);
  m.def("norm_backward", &backward, ReleaseGil(), "dtype"_a, "sizes"_a, "slope"_a, "eps"_a, "given"_a, "num_threads"_a,
        py::kw_only(), "activated"_a = 0, "values"_a = 0, "weight"_a = 0, "frames"_a = 0, "means"_a = 0,
        "squares"_a = 0, "dy"_a = 0, "d_activated"_a = 0, "d_means"_a = 0, "d_squares"_a = 0, "dx"_a = 0,
        "d_weight"_a = 0, "d_bias"_a = 0, "d_mean"_a = 0, "d_square"_a = 0, "d_given_mean"_a = 0,
        "d_given_square"_a = 0);
}

}  // namespace rlv2v
