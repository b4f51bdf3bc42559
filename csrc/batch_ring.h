// Reuses the memory of samples: a few batches of tensors, each free once nothing outside refers to any part of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "replay/buffer.h"

namespace rlv2v {

namespace py = pybind11;

// The arrays of one sample: where the core writes, and the Python batch that owns the memory.
struct Batch {
  py::tuple tensors;  // over one storage
  py::tuple sharing;  // the same with the states and actions as views of the next states
  py::object storage;  // that storage's address, as torch counts its users
  PyObject* ids = nullptr;  // one tensor of both tuples, which own it
  std::size_t rows = 0;
  py::ssize_t users = 0;               // of the storage, by these tuples alone
  std::vector<Py_ssize_t> references;  // to each tensor of either tuple, by this batch alone
  SampleOut out{};
};

class BatchRing {
 public:
  // Holds `size` batches. make_batch(n) -> (named tuple of tensors, the same with shared states, storage);
  // count_users(storage) -> int.
  BatchRing(std::size_t size, py::object make_batch, py::object count_users)
      : size_(size), make_batch_(std::move(make_batch)), count_users_(std::move(count_users)) {}

  // Returns the batch that has this very tensor as its ids, or null.
  const Batch* find_ids(const py::object& ids) const {
    for (const Batch& batch : batches_) {
      if (ids.ptr() == batch.ids) return &batch;
    }
    return nullptr;
  }

  // Returns a batch of n rows that nothing outside the ring refers to, a new one if all are in use.
  Batch free_batch(std::size_t n) {
    for (const Batch& batch : batches_) {
      if (batch.rows == n && is_free(batch)) return batch;
    }
    Batch batch;
    batch.rows = n;
    {
      const auto parts = make_batch_(n).cast<py::tuple>();  // ends here: its references are not to be counted
      batch.tensors = parts[0];
      batch.sharing = parts[1];
      batch.storage = parts[2];
    }
    batch.ids = py::object(batch.tensors.attr("ids")).ptr();
    batch.out.for_each([&batch](const char* name, auto*& pointer, SampleOut::Row) {
      const auto address = batch.tensors.attr(name).attr("data_ptr")().template cast<std::uintptr_t>();
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(address);
    });
    batch.users = count_users(batch);
    all_of_tensors(batch, [&batch](PyObject* tensor) {
      batch.references.push_back(Py_REFCNT(tensor));
      return true;
    });
    if (size_ == 0) return batch;
    Batch dropped;  // ends after the ring is in order again
    if (batches_.size() == size_) {
      dropped = std::move(batches_.front());
      batches_.erase(batches_.begin());
    }
    batches_.push_back(batch);
    return batch;
  }

 private:
  template <class Predicate>
  static bool all_of_tensors(const Batch& batch, const Predicate& predicate) {
    for (PyObject* tuple : {batch.tensors.ptr(), batch.sharing.ptr()}) {
      for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(tuple); ++k) {
        if (!predicate(PyTuple_GET_ITEM(tuple, k))) return false;
      }
    }
    return true;
  }

  bool is_free(const Batch& batch) const {
    if (batch.tensors.ref_count() > 1 || batch.sharing.ref_count() > 1) return false;
    auto references = batch.references.begin();
    return all_of_tensors(batch, [&](PyObject* tensor) { return Py_REFCNT(tensor) == *references++; }) &&
           count_users(batch) <= batch.users;
  }

  // Called without a tuple of arguments: its allocation could collect garbage, and so run any code amid the ring.
  py::ssize_t count_users(const Batch& batch) const {
    PyObject* count = PyObject_CallOneArg(count_users_.ptr(), batch.storage.ptr());
    if (count == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(count).cast<py::ssize_t>();
  }

  std::size_t size_;
  py::object make_batch_;
  py::object count_users_;
  std::vector<Batch> batches_;
};

}  // namespace rlv2v
