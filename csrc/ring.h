// Memory of samples that serves again: a few batches of tensors, each free as soon as nothing outside refers to any part of it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "replay/buffer.h"

namespace rlv2v {

namespace py = pybind11;

// Arrays of one sample: where the core writes, and the Python batch that owns the memory.
struct Slot {
  py::tuple batch;     // of tensors over one storage
  py::tuple sharing;   // the same with the states and actions as views of the next states
  py::object storage;  // that storage's address, as torch counts its users
  std::size_t rows;
  py::ssize_t users;                   // of the storage, by these tuples alone
  std::vector<Py_ssize_t> references;  // to each tensor of either tuple, by these tuples alone
  SampleOut out;
};

class Ring {
 public:
  // Keeps `size` batches. make_batch(n) -> (tuple of tensors, the same with shared states, addresses, storage);
  // count_users(storage) -> int.
  Ring(std::size_t size, py::object make_batch, py::object count_users)
      : size_(size), make_batch_(std::move(make_batch)), count_users_(std::move(count_users)) {}

  // The slot whose batch has this very tensor as its ids; null when there is none.
  const Slot* with_ids(const py::object& ids) const {
    constexpr std::size_t kIds = 10;
    for (const Slot& slot : slots_) {
      if (ids.is(slot.batch[kIds]) || ids.is(slot.sharing[kIds])) return &slot;
    }
    return nullptr;
  }

  // A slot of n rows that nothing outside the ring refers to; a new one where all are in use.
  Slot free_slot(std::size_t n) {
    for (const Slot& slot : slots_) {
      if (slot.rows == n && is_free(slot)) return slot;
    }
    auto made = make_batch_(n).cast<py::tuple>();
    Slot slot{made[0].cast<py::tuple>(), made[1].cast<py::tuple>(), made[3], n, 0, {}, {}};
    const auto at = made[2].cast<std::vector<std::uintptr_t>>();
    slot.out = {reinterpret_cast<std::uint8_t*>(at[0]), reinterpret_cast<std::int64_t*>(at[1]),
                reinterpret_cast<std::uint8_t*>(at[2]), reinterpret_cast<float*>(at[3]),
                reinterpret_cast<std::uint8_t*>(at[4]), reinterpret_cast<std::int64_t*>(at[5]),
                reinterpret_cast<float*>(at[6]),        reinterpret_cast<std::uint8_t*>(at[7]),
                reinterpret_cast<std::int64_t*>(at[8]), reinterpret_cast<bool*>(at[9]),
                reinterpret_cast<std::int64_t*>(at[10]), reinterpret_cast<float*>(at[11])};
    made = py::tuple();  // its references are not to be counted
    slot.users = users_of(slot);
    for_tensors(slot, [&slot](PyObject* tensor) {
      slot.references.push_back(Py_REFCNT(tensor));
      return true;
    });
    if (size_ == 0) return slot;
    Slot dropped;  // dies after the ring is whole again
    if (slots_.size() == size_) {
      dropped = std::move(slots_.front());
      slots_.erase(slots_.begin());
    }
    slots_.push_back(slot);
    return slot;
  }

 private:
  // False as soon as the call is.
  template <class Call>
  static bool for_tensors(const Slot& slot, const Call& call) {
    for (PyObject* tuple : {slot.batch.ptr(), slot.sharing.ptr()}) {
      for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tuple); ++k) {
        if (!call(PyTuple_GET_ITEM(tuple, k))) return false;
      }
    }
    return true;
  }

  bool is_free(const Slot& slot) const {
    if (slot.batch.ref_count() > 1 || slot.sharing.ref_count() > 1) return false;
    std::size_t at = 0;
    if (!for_tensors(slot, [&](PyObject* tensor) { return Py_REFCNT(tensor) == slot.references[at++]; })) return false;
    return users_of(slot) <= slot.users;
  }

  // Called without a tuple of arguments: its allocation could collect garbage, and so run anybody's code amid the ring.
  py::ssize_t users_of(const Slot& slot) const {
    PyObject* count = PyObject_CallOneArg(count_users_.ptr(), slot.storage.ptr());
    if (count == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(count).cast<py::ssize_t>();
  }

  std::size_t size_;
  py::object make_batch_;
  py::object count_users_;
  std::vector<Slot> slots_;
};

}  // namespace rlv2v
