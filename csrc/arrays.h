// Checks the type and shape of numpy arrays, with errors that name the array, and hands the core's arrays to numpy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "pages.h"

namespace rlv2v {

namespace py = pybind11;
using Shape = std::vector<py::ssize_t>;  // in what is expected, -1 is any length
template <class T>
using Array = py::array_t<T, py::array::c_style>;

inline std::string describe(const Shape& shape) {
  std::string text = "(";
  for (std::size_t k = 0; k < shape.size(); ++k) {
    text += (k > 0 ? ", " : "") + (shape[k] < 0 ? "n" : std::to_string(shape[k]));
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline bool has_shape(const py::array& array, const Shape& shape) {
  bool fits = static_cast<std::size_t>(array.ndim()) == shape.size();
  for (std::size_t k = 0; fits && k < shape.size(); ++k) {
    fits = shape[k] < 0 || array.shape(static_cast<py::ssize_t>(k)) == shape[k];
  }
  return fits;
}

// Returns the array as C-contiguous T of the shape, copied only if its memory is laid out otherwise.
template <class T>
Array<T> as_array(const py::handle& value, const char* name, const Shape& shape) {
  if (Array<T>::check_(value)) {  // true in nearly every call, and takes a few nanoseconds
    const auto array = py::reinterpret_borrow<Array<T>>(value);
    if (has_shape(array, shape)) return array;
  }
  std::string got = py::type::of(value).attr("__name__").template cast<std::string>();
  if (py::isinstance<py::array>(value)) {
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (array.dtype().equal(py::dtype::of<T>()) && has_shape(array, shape)) {
      auto contiguous = Array<T>::ensure(array);
      if (!contiguous) throw std::bad_alloc();
      return contiguous;
    }
    got = py::str(array.dtype()).cast<std::string>() + " " + describe({array.shape(), array.shape() + array.ndim()});
  }
  throw py::value_error("replay: " + std::string(name) + " must be " +
                        py::str(py::dtype::of<T>()).template cast<std::string>() + " " + describe(shape) + ", got " +
                        got);
}

// Returns the memory of the caller's own array, never of a copy.
template <class T>
T* writable(const py::handle& value, const char* name, const Shape& shape) {
  auto array = as_array<T>(value, name, shape);
  if (!array.is(value) || !array.writeable()) {
    throw py::value_error("replay: " + std::string(name) +
                          " must be writeable and C-contiguous, got an array that is not");
  }
  return array.mutable_data();
}

// Hands the memory of a core's array over to numpy.
template <class T>
py::array_t<T> to_numpy(PageArray<T>&& values, const Shape& shape) {
  auto* owned = new PageArray<T>(std::move(values));
  const py::capsule owner(owned, [](void* pointer) { delete static_cast<PageArray<T>*>(pointer); });
  return py::array_t<T>(shape, owned->data(), owner);
}

// Copies an array into the core: what the core has checked must not change under it.
template <class T>
PageArray<T> copy_array(const py::handle& value, const char* name, const Shape& shape) {
  const auto array = as_array<T>(value, name, shape);
  PageArray<T> values(static_cast<std::size_t>(array.size()));
  std::copy(array.data(), array.data() + array.size(), values.data());
  return values;
}

}  // namespace rlv2v
