// The persistent ConvLSTM in rlv2v._native: device pointers and the stream are integers, so the module needs no torch.
#include "bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "convlstm/persistent.h"

namespace rlv2v {

namespace py = pybind11;

namespace {

using namespace py::literals;
using Address = std::uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

Half16 dtype_of(const std::string& name) {
  if (name == "float16") return Half16::kFloat16;
  if (name == "bfloat16") return Half16::kBfloat16;
  throw std::invalid_argument("persistent: dtype must be float16 or bfloat16, got " + name);
}

py::object plan(const ConvLstmShape& shape, bool backward, int sms, int shared_bytes) {
  PersistentPlan plan{};
  if (const std::string reason = plan_persistent(shape, backward, {sms, shared_bytes}, plan); !reason.empty()) {
    return py::str(reason);
  }
  const auto tile = py::make_tuple(1 << plan.log_batch, 1 << plan.log_height, 1 << plan.log_width);
  return py::dict("slice"_a = plan.slice, "slices"_a = plan.slices, "tile"_a = tile, "tiles"_a = plan.tiles,
                  "ctas"_a = plan.ctas, "blocks"_a = plan.blocks, "chunk"_a = plan.chunk,
                  "weight_bytes"_a = plan.weight_bytes, "shared_bytes"_a = plan.shared_bytes);
}

// Converts an address to a pointer, aligned for the kernels' wide loads; 0 is None where that is allowed.
template <class T>
T* pointer(Address address, const char* name, bool optional = false) {
  if ((address == 0 && !optional) || address % 16 != 0) {
    throw std::invalid_argument("persistent: " + std::string(name) + " must be at an address that 16 divides, got " +
                                std::to_string(address));
  }
  return reinterpret_cast<T*>(address);
}
std::uint16_t* halves(Address address, const char* name, bool optional = false) {
  return pointer<std::uint16_t>(address, name, optional);
}
float* floats(Address address, const char* name, bool optional = false) {
  return pointer<float>(address, name, optional);
}

template <class Pass>
void run(const ConvLstmShape& shape, const std::string& dtype, int device, const Pass& pass, Address stream) {
  [[maybe_unused]] const Half16 type = dtype_of(dtype);
#ifdef RLV2V_CUDA
  run_persistent(shape, type, device, pass, reinterpret_cast<void*>(stream));
#else
  (void)shape, (void)device, (void)pass, (void)stream;
  throw std::invalid_argument("persistent: built without CUDA");
#endif
}

void forward(const ConvLstmShape& shape, const std::string& dtype, int device, Address stream, Address a, Address w_h,
             Address h0, Address c0, Address hs, Address cs, Address gates, Address counters) {
  const PersistentForward pass{{}, halves(a, "a"), halves(w_h, "w_h"), halves(h0, "h0", true), floats(c0, "c0", true),
                               halves(hs, "hs"), floats(cs, "cs"), halves(gates, "gates", true),
                               pointer<std::uint32_t>(counters, "counters")};
  run(shape, dtype, device, pass, stream);
}

void backward(const ConvLstmShape& shape, const std::string& dtype, int device, Address stream, Address dhs,
              Address dcs, Address gates, bool activated, Address cs, Address c0, Address w_h, Address da, Address dh0,
              Address dc0, Address counters) {
  const PersistentBackward pass{{}, halves(dhs, "dhs"), floats(dcs, "dcs", true), halves(gates, "gates"), activated,
                                floats(cs, "cs"), floats(c0, "c0", true), halves(w_h, "w_h"), halves(da, "da"),
                                halves(dh0, "dh0", true), floats(dc0, "dc0"),
                                pointer<std::uint32_t>(counters, "counters")};
  run(shape, dtype, device, pass, stream);
}

}  // namespace

void bind_persistent(py::module_& m) {
#ifdef RLV2V_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("persistent_counters") = kCounterStride;

  py::class_<ConvLstmShape>(m, "ConvLstmShape")
      .def(py::init([](int groups, int steps, int batch, int channels, int height, int width, int kernel) {
             return ConvLstmShape{groups, steps, batch, channels, height, width, kernel};
           }),
           "groups"_a, "steps"_a, "batch"_a, "channels"_a, "height"_a, "width"_a, "kernel"_a);
  m.def("persistent_plan", &plan, "shape"_a, "backward"_a, "sms"_a, "shared_bytes"_a);
  m.def("persistent_forward", &forward, "shape"_a, "dtype"_a, "device"_a, "stream"_a, "a"_a, "w_h"_a, "h0"_a, "c0"_a,
        "hs"_a, "cs"_a, "gates"_a, "counters"_a, ReleaseGil());
  m.def("persistent_backward", &backward, "shape"_a, "dtype"_a, "device"_a, "stream"_a, "dhs"_a, "dcs"_a, "gates"_a,
        "activated"_a, "cs"_a, "c0"_a, "w_h"_a, "da"_a, "dh0"_a, "dc0"_a, "counters"_a, ReleaseGil());
}

}  // namespace rlv2v
