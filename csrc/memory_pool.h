// Memory that is used again: large buffers of the same sizes, made and dropped in every step of a training.
//
// New pages cost a fault and a clearing each, 0.5 to 1.5 us for 4 KiB: for a ConvLSTM's buffers up to a tenth of its time. Idle
// blocks are kept as long as idle and used ones together are at most 1.5 times what was ever in use at once; the ones that
// have been idle for longest go first. Any thread may call.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "pages.h"

namespace rlv2v {

class MemoryPool {
 public:
  // At least `bytes`, uninitialised, beginning at a multiple of 2 MiB when there are so many. Throws std::bad_alloc.
  Pages take(std::size_t bytes);
  void give(Pages block) noexcept;

  std::size_t used_bytes() const;
  std::size_t idle_bytes() const;

 private:
  static constexpr std::size_t kMostBytes = std::size_t{1} << 46;

  void count_used(std::size_t bytes);

  mutable std::mutex mutex_;
  std::vector<Pages> idle_;  // longest idle first
  std::size_t used_bytes_ = 0, idle_bytes_ = 0, most_used_bytes_ = 0;
};

}  // namespace rlv2v
