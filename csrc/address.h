// Addresses cross the binding as integers, 0 for null, which the core checks.
#pragma once

#include <cstdint>

namespace rlv2v {

using Address = std::uintptr_t;

struct Pointer {
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
  Address address;
};

}  // namespace rlv2v
