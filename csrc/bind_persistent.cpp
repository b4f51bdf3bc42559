// The persistent ConvLSTM in rlv2v._native: device pointers and the stream come as integers, so that no torch is needed
// here.
#include "bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "convlstm/persistent.h"

namespace py = pybind11;

namespace rlv2v {

namespace {

using Address = std::uintptr_t;
using Free = py::call_guard<py::gil_scoped_release>;

Sixteen dtype_of(const std::string& name) {
  if (name == "float16") return Sixteen::kHalf;
  if (name == "bfloat16") return Sixteen::kBfloat;
  throw std::invalid_argument("persistent: dtype must be float16 or bfloat16, got " + name);
}

py::object plan(const ConvLstmShape& shape, bool backward, int sms, int shared_bytes) {
  PersistentPlan found{};
  if (const std::string reason = plan_persistent(shape, backward, {sms, shared_bytes}, found); !reason.empty()) {
    return py::str(reason);
  }
  py::dict values;
  values["slice"] = found.slice;
  values["slices"] = found.slices;
  values["tile"] = py::make_tuple(1 << found.log_batch, 1 << found.log_height, 1 << found.log_width);
  values["tiles"] = found.tiles();
  values["ctas"] = found.ctas;
  values["blocks"] = found.blocks;
  values["chunk"] = found.chunk;
  values["weight_bytes"] = found.weight_bytes;
  values["shared_bytes"] = found.shared_bytes;
  return values;
}

// The address as a pointer, aligned for the kernels' wide loads; 0 stands for None where that is allowed.
template <class T>
T* pointer(Address address, const char* name, bool optional = false) {
  if ((address == 0 && !optional) || address % 16 != 0) {
    throw std::invalid_argument("persistent: " + std::string(name) + " must be at an address that 16 divides, got " +
                                std::to_string(address));
  }
  return reinterpret_cast<T*>(address);
}

template <class Pass>
void run(const ConvLstmShape& shape, const std::string& dtype, int device, const Pass& pass, Address stream) {
  [[maybe_unused]] const Sixteen type = dtype_of(dtype);
#ifdef RLV2V_CUDA
  run_persistent(shape, type, device, pass, reinterpret_cast<void*>(stream));
#else
  (void)shape, (void)device, (void)pass, (void)stream;
  throw std::invalid_argument("persistent: built without CUDA");
#endif
}

void forward(const ConvLstmShape& shape, const std::string& dtype, int device, Address stream, Address a, Address w_h,
             Address h0, Address c0, Address hs, Address cs, Address gates, Address counters) {
  const PersistentForward pass{{},
                               pointer<const std::uint16_t>(a, "a"),
                               pointer<const std::uint16_t>(w_h, "w_h"),
                               pointer<const std::uint16_t>(h0, "h0", true),
                               pointer<const float>(c0, "c0", true),
                               pointer<std::uint16_t>(hs, "hs"),
                               pointer<float>(cs, "cs"),
                               pointer<std::uint16_t>(gates, "gates", true),
                               pointer<std::uint32_t>(counters, "counters")};
  run(shape, dtype, device, pass, stream);
}

void backward(const ConvLstmShape& shape, const std::string& dtype, int device, Address stream, Address dhs,
              Address dcs, Address gates, bool activated, Address cs, Address c0, Address w_h, Address da, Address dh0,
              Address dc0, Address counters) {
  const PersistentBackward pass{{},
                                pointer<const std::uint16_t>(dhs, "dhs"),
                                pointer<const float>(dcs, "dcs", true),
                                pointer<const std::uint16_t>(gates, "gates"),
                                activated,
                                pointer<const float>(cs, "cs"),
                                pointer<const float>(c0, "c0", true),
                                pointer<const std::uint16_t>(w_h, "w_h"),
                                pointer<std::uint16_t>(da, "da"),
                                pointer<std::uint16_t>(dh0, "dh0", true),
                                pointer<float>(dc0, "dc0"),
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
           py::arg("groups"), py::arg("steps"), py::arg("batch"), py::arg("channels"), py::arg("height"),
           py::arg("width"), py::arg("kernel"));
  m.def("persistent_plan", &plan, py::arg("shape"), py::arg("backward"), py::arg("sms"), py::arg("shared_bytes"));
  m.def("persistent_forward", &forward, py::arg("shape"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
        py::arg("a"), py::arg("w_h"), py::arg("h0"), py::arg("c0"), py::arg("hs"), py::arg("cs"), py::arg("gates"),
        py::arg("counters"), Free());
  m.def("persistent_backward", &backward, py::arg("shape"), py::arg("dtype"), py::arg("device"), py::arg("stream"),
        py::arg("dhs"), py::arg("dcs"), py::arg("gates"), py::arg("activated"), py::arg("cs"), py::arg("c0"),
        py::arg("w_h"), py::arg("da"), py::arg("dh0"), py::arg("dc0"), py::arg("counters"), Free());
}

}  // namespace rlv2v
