// numpy arrays as pointers of a type and shape, or an error that names the array; the core's arrays as numpy's.
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
using Shape = std::vector<py::ssize_t>;

inline std::string describe(const Shape& shape) {
  std::string text = "(";
  for (std::size_t k = 0; k < shape.size(); ++k) {
    if (k > 0) text += ", ";
    text += shape[k] < 0 ? "n" : std::to_string(shape[k]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// The array as C-contiguous T of the shape (-1: any length), copied only when its memory is laid out otherwise.
template <class T>
py::array_t<T, py::array::c_style> checked(const py::handle& value, const char* name, const Shape& shape) {
  if (py::array_t<T, py::array::c_style>::check_(value)) {  // as it is in nearly every call, for a few nanoseconds
    const auto array = py::reinterpret_borrow<py::array_t<T, py::array::c_style>>(value);
    bool fits = static_cast<std::size_t>(array.ndim()) == shape.size();
    for (std::size_t k = 0; fits && k < shape.size(); ++k) {
      fits = shape[k] < 0 || array.shape(static_cast<py::ssize_t>(k)) == shape[k];
    }
    if (fits) return array;
  }
  const auto expected = [&] {
    return "replay: " + std::string(name) + " must be " + py::str(py::dtype::of<T>()).cast<std::string>() + " " +
           describe(shape) + ", got ";
  };
  if (!py::isinstance<py::array>(value)) {
    throw py::value_error(expected() + py::type::of(value).attr("__name__").template cast<std::string>());
  }
  const auto array = py::reinterpret_borrow<py::array>(value);
  const Shape got(array.shape(), array.shape() + array.ndim());
  bool fits = array.dtype().equal(py::dtype::of<T>()) && got.size() == shape.size();
  for (std::size_t k = 0; fits && k < shape.size(); ++k) fits = shape[k] < 0 || got[k] == shape[k];
  if (!fits) throw py::value_error(expected() + py::str(array.dtype()).cast<std::string>() + " " + describe(got));
  auto contiguous = py::array_t<T, py::array::c_style>::ensure(array);
  if (!contiguous) throw std::bad_alloc();
  return contiguous;
}

template <class T>
py::array_t<T> adopt(PageArray<T>&& values, const Shape& shape) {
  auto* kept = new PageArray<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<PageArray<T>*>(pointer); });
  return py::array_t<T>(shape, kept->data(), owner);
}

// A column of a saved state, copied: what the core has checked must not change under it.
template <class T>
PageArray<T> copied(const py::dict& state, const char* name, const Shape& shape) {
  const auto array = checked<T>(state[name], name, shape);
  PageArray<T> values(static_cast<std::size_t>(array.size()));
  std::copy(array.data(), array.data() + array.size(), values.data());
  return values;
}

}  // namespace rlv2v
