// A buffer belongs to one process: in a forked child its lock may be held by a thread that was not forked, and its file
// is shared with the parent.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace rlv2v {

class ForkGuard {
 public:
  ForkGuard() : forks_(forks().load()) {}
  bool in_owner() const noexcept { return forks_ == forks().load(std::memory_order_relaxed); }
  void check() const {
    if (!in_owner()) {
      throw std::runtime_error("replay: one process owns a buffer, this one was forked from it; make a buffer here");
    }
  }

 private:
  // The number of forks between this process and the one that loaded this code.
  static std::atomic<std::uint64_t>& forks() {
    static std::atomic<std::uint64_t> count{0};
    static const int registered = pthread_atfork(nullptr, nullptr, [] { ++forks(); });
    static_cast<void>(registered);
    return count;
  }

  std::uint64_t forks_;
};

}  // namespace rlv2v
