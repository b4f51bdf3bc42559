#include "memory_pool.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

namespace rlv2v {
namespace {

constexpr std::size_t kStep = std::size_t{1}
                              << 20;   // sizes are rounded up to it, so that similar requests share blocks
constexpr std::size_t kMaxUnused = 8;  // a block serves requests that leave at most an eighth of it unused

}  // namespace

Pages MemoryPool::take(std::size_t bytes) {
  if (bytes > kMaxBytes) throw std::bad_alloc();
  bytes = (bytes + kStep - 1) / kStep * kStep;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The block that came back last is the likeliest to be in the caches.
    for (auto block = idle_.rbegin(); block != idle_.rend(); ++block) {
      if (block->bytes() < bytes || block->bytes() - bytes > block->bytes() / kMaxUnused) continue;
      Pages reused = std::move(*block);
      idle_.erase(std::next(block).base());
      idle_bytes_ -= reused.bytes();
      count_used(reused.bytes());
      return reused;
    }
  }
  Pages block(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  count_used(bytes);
  return block;
}

void MemoryPool::give_back(Pages block) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t bytes = block.bytes();
  used_bytes_ -= bytes;
  try {
    idle_.push_back(std::move(block));
    idle_bytes_ += bytes;
  } catch (const std::bad_alloc&) {  // no room in the list: the block goes back to the system
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
  max_used_bytes_ = std::max(max_used_bytes_, used_bytes_);
  // Half as much again: at exactly as much, two steps whose buffers overlap in time would evict each other's.
  const std::size_t max_bytes = max_used_bytes_ + max_used_bytes_ / 2;
  auto block = idle_.begin();
  for (; block != idle_.end() && used_bytes_ + idle_bytes_ > max_bytes; ++block) idle_bytes_ -= block->bytes();
  idle_.erase(idle_.begin(), block);
}

}  // namespace rlv2v
