// What guards a buffer: a lock for many readers or one writer, and a check that the process is the one that made it.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

namespace rlv2v {

// Starves neither readers nor writers: all queue at the gate, and a writer at its head lets no later reader pass while
// the earlier ones finish.
class FairLock {
 public:
  void lock() {
    const std::lock_guard<std::mutex> queue(gate_);
    body_.lock();
  }
  void unlock() { body_.unlock(); }
  void lock_shared() {
    const std::lock_guard<std::mutex> queue(gate_);
    body_.lock_shared();
  }
  void unlock_shared() { body_.unlock_shared(); }

 private:
  std::mutex gate_;
  std::shared_mutex body_;
};

using WriteLock = std::lock_guard<FairLock>;
using ReadLock = std::shared_lock<FairLock>;

// In a forked child a buffer's lock may be held by a thread that was not forked, and its file is the parent's too.
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
