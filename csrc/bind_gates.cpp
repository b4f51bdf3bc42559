// The fused gates and the memory pool in rlv2v._native.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "address.h"
#include "convlstm/gates.h"
#include "memory_pool.h"

namespace py = pybind11;

namespace {

using rlv2v::Address;
using rlv2v::Pointer;

void forward(int dtype, std::int64_t rows, std::int64_t length, Address a, Address a_h, Address c_prev, Address h,
             Address c, Address gates, int num_threads) {
  rlv2v::gates_forward({static_cast<rlv2v::FloatType>(dtype), rows, length, Pointer{a}, Pointer{a_h}, Pointer{c_prev},
                        Pointer{h}, Pointer{c}, Pointer{gates}, num_threads});
}

void backward(int dtype, bool activated, std::int64_t rows, std::int64_t length, Address dh1, Address dh2,
              Address dc_out, Address carry_in, Address gates, Address c, Address c_prev, Address da, Address carry_out,
              int num_threads) {
  rlv2v::gates_backward({static_cast<rlv2v::FloatType>(dtype), activated, rows, length, Pointer{dh1}, Pointer{dh2},
                         Pointer{dc_out}, Pointer{carry_in}, Pointer{gates}, Pointer{c}, Pointer{c_prev}, Pointer{da},
                         Pointer{carry_out}, num_threads});
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

namespace rlv2v {

void bind_gates(py::module_& m) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.def("gates_forward", &forward, ReleaseGil());
  m.def("gates_backward", &backward, ReleaseGil());
  py::class_<Block>(m, "Block", py::buffer_protocol()).def(py::init<std::size_t>()).def_buffer(&Block::buffer);
  m.def("pool_bytes", [] { return std::make_pair(pool().used_bytes(), pool().idle_bytes()); });
}

}  // namespace rlv2v
