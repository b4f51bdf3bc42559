// A lock for many readers or one writer that starves neither: all queue at the gate, and a writer at its head lets no
// later reader pass while the earlier ones finish.
#pragma once

#include <mutex>
#include <shared_mutex>

namespace rlv2v {

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

}  // namespace rlv2v
