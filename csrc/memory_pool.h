// Reuses memory: large buffers of the same sizes, made and dropped in every step of a training.
//
// Each new page costs a fault and a clearing, 0.5 to 1.5 us for 4 KiB: up to a tenth of a ConvLSTM's time. Idle blocks
// stay as long as idle and used ones together are at most 1.5 times the largest use so far; the longest idle go first.
// Any thread may call.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "pages.h"

namespace rlv2v {

class MemoryPool {
 public:
  // Returns at least `bytes`, uninitialised, at a multiple of 2 MiB if there are that many. Throws std::bad_alloc.
  Pages take(std::size_t bytes);
  void give_back(Pages block) noexcept;

  std::size_t used_bytes() const;
  std::size_t idle_bytes() const;

 private:
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 46;

  void count_used(std::size_t bytes);

  mutable std::mutex mutex_;
  std::vector<Pages> idle_;  // longest idle first
  std::size_t used_bytes_ = 0, idle_bytes_ = 0, max_used_bytes_ = 0;
};

}  // namespace rlv2v
