// The bilateral grid's kernels, and the choice of the instruction set, in rlv2v._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "address.h"
#include "bilateral/slice.h"
#include "isa.h"

namespace py = pybind11;

namespace rlv2v {

namespace {

using Sizes = std::array<std::int64_t, 6>;

SliceShape shape_of(const Sizes& n) { return {n[0], n[1], n[2], n[3], n[4], n[5]}; }

void forward(const Sizes& sizes, Address grid, Address guide, Address frames, Address out, int num_threads) {
  slice_forward({shape_of(sizes), Pointer{grid}, Pointer{guide}, Pointer{frames}, Pointer{out}, num_threads});
}

void backward(const Sizes& sizes, Address grid, Address guide, Address frames, Address d_out, Address d_grid,
              Address d_guide, Address d_frames, int num_threads) {
  slice_backward({shape_of(sizes), Pointer{grid}, Pointer{guide}, Pointer{frames}, Pointer{d_out}, Pointer{d_grid},
                  Pointer{d_guide}, Pointer{d_frames}, num_threads});
}

void frame(const Sizes& sizes, Address grid, Address curve, std::int64_t num_curves, Address around,
           const std::array<std::int64_t, 3>& around_sizes, Address in, Address out, int num_threads) {
  slice_frame({shape_of(sizes), Pointer{grid}, Pointer{curve}, num_curves, Pointer{around}, around_sizes[0],
               around_sizes[1], around_sizes[2], Pointer{in}, Pointer{out}, num_threads});
}

}  // namespace

void bind_slice(py::module_& m) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.attr("max_bins") = kMaxBins;
  m.attr("max_around") = kMaxAround;
  m.def("slice_forward", &forward, ReleaseGil());
  m.def("slice_backward", &backward, ReleaseGil());
  m.def("slice_frame", &frame, ReleaseGil());
  m.def("isa", [] { return isa_name(isa()); });
  m.def("isas", [] {
    py::list names;
    for (const Isa set : available_isas()) names.append(isa_name(set));
    return names;
  });
  m.def("set_isa", [](const std::string& name) { choose_isa(name.c_str()); });
}

}  // namespace rlv2v
