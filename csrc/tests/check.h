// Shared by the tests. CHECK(condition) reports and exits with 1 if it does not hold, in every build type.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "replay/draws.h"

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (false)

// Returns whether the call throws this exception.
template <class Exception, class Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const Exception&) {
    return true;
  }
  return false;
}

struct Draws {
  explicit Draws(std::uint64_t seed) : key(rlv2v::draws_key(seed)) {}
  double uniform(std::uint64_t k) const { return rlv2v::uniform_draw(key, k); }
  std::uint64_t key;
};
