// The parts of rlv2v._native that have a file of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace rlv2v {

void bind_gates(pybind11::module_& m);
void bind_persistent(pybind11::module_& m);

}  // namespace rlv2v
