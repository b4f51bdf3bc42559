#include "memory_pool.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

namespace rlv2v {
namespace {

constexpr std::size_t kStep = std::size_t{1} << 20;  // sizes are rounded up to it, so that near ones serve each other
constexpr std::size_t kSpare = 8;                    // a block serves requests that leave at most an eighth of it unused

}  // namespace

Pages MemoryPool::take(std::size_t bytes) {
  if (bytes > kMostBytes) throw std::bad_alloc();
  bytes = (bytes + kStep - 1) / kStep * kStep;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The block that was given back last is the likeliest to be in the caches.
    for (auto block = idle_.rbegin(); block != idle_.rend(); ++block) {
      if (block->bytes() < bytes || block->bytes() - bytes > block->bytes() / kSpare) continue;
      Pages found = std::move(*block);
      idle_.erase(std::next(block).base());
      idle_bytes_ -= found.bytes();
      count_used(found.bytes());
      return found;
    }
  }
  Pages made(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  count_used(bytes);
  return made;
}

void MemoryPool::give(Pages block) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t bytes = block.bytes();
  used_bytes_ -= bytes;
  try {
    idle_.push_back(std::move(block));
    idle_bytes_ += bytes;
  } catch (const std::bad_alloc&) {  // no room to remember it: it goes back to the system
  }
}

std::size_t MemoryPool::used_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return used_bytes_;
}

std::size_t MemoryPool::idle_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return idle_bytes_;
}

void MemoryPool::count_used(std::size_t bytes) {
  used_bytes_ += bytes;
  most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
  // Half as much again: two steps whose buffers overlap in time would drive out each other's at exactly as much.
  const std::size_t most_bytes = most_used_bytes_ + most_used_bytes_ / 2;
  auto kept = idle_.begin();
  for (; kept != idle_.end() && used_bytes_ + idle_bytes_ > most_bytes; ++kept) idle_bytes_ -= kept->bytes();
  idle_.erase(idle_.begin(), kept);
}

}  // namespace rlv2v
