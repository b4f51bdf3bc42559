// The fused gates and the memory pool in rlv2v._native: addresses are integers, 0 for null, which the core checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "bindings.h"
#include "convlstm/gates.h"
#include "memory_pool.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

void forward(int dtype, std::int64_t rows, std::int64_t length, Address a, Address a_h, Address c_prev, Address h,
             Address c, Address gates, int num_threads) {
  rlv2v::gates_forward({static_cast<rlv2v::GatesType>(dtype), rows, length, ptr<const void>(a),
                        ptr<const void>(a_h), ptr<const float>(c_prev), ptr<void>(h), ptr<float>(c),
                        ptr<void>(gates), num_threads});
}

void backward(int dtype, bool activated, std::int64_t rows, std::int64_t length, Address dh1, Address dh2,
              Address dc_out, Address carry_in, Address gates, Address c, Address c_prev, Address da, Address carry_out,
              int num_threads) {
  rlv2v::gates_backward({static_cast<rlv2v::GatesType>(dtype), activated, rows, length, ptr<const void>(dh1),
                         ptr<const void>(dh2), ptr<const float>(dc_out), ptr<const float>(carry_in),
                         ptr<const void>(gates), ptr<const float>(c), ptr<const float>(c_prev),
                         ptr<void>(da), ptr<float>(carry_out), num_threads});
}

// The pool is never destroyed: blocks may be dropped while the interpreter ends.
rlv2v::MemoryPool& pool() {
  static auto* const pool = new rlv2v::MemoryPool();
  return *pool;
}

// A block of the pool as a writable buffer of bytes, held as long as anything refers to the buffer.
class Block {
 public:
  explicit Block(std::size_t bytes) : pages_(pool().take(bytes)), bytes_(bytes) {}
  ~Block() { pool().give_back(std::move(pages_)); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  py::buffer_info buffer() {
    return {pages_.data(), 1, py::format_descriptor<unsigned char>::format(), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  rlv2v::Pages pages_;
  std::size_t bytes_;
};

}  // namespace

void rlv2v::bind_gates(py::module_& m) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.def("gates_forward", &forward, ReleaseGil());
  m.def("gates_backward", &backward, ReleaseGil());
  py::class_<Block>(m, "Block", py::buffer_protocol()).def(py::init<std::size_t>()).def_buffer(&Block::buffer);
  m.def("pool_bytes", [] { return std::make_pair(pool().used_bytes(), pool().idle_bytes()); });
  m.def("gates_isa", [] { return std::string(rlv2v::gates_kernels().name); });
  m.def("gates_isas", [] {
    py::list names;
    for (const rlv2v::GatesKernels* set : rlv2v::available_gates()) names.append(set->name);
    return names;
  });
  m.def("gates_set_isa", [](const std::string& name) { rlv2v::choose_gates(name.c_str()); });
}
