#include "replay/frame_arena.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace rlv2v {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{1} << 21;
constexpr std::size_t kPageBytes = std::size_t{1} << 16;  // a multiple of the page size of every common system

// By a quarter at least, so that many small growths cost linear time.
template <class T>
void grow(std::vector<T>& values, std::size_t size) {
  if (values.capacity() < size) values.reserve(std::max(size, values.capacity() + values.capacity() / 4));
}

}  // namespace

FrameArena::FrameArena(std::size_t frame_bytes, std::size_t max_frames, const std::string& path)
    : frame_bytes_(frame_bytes), max_frames_(std::min(max_frames, kMostFrames)) {
  if (frame_bytes == 0) throw std::invalid_argument("frame arena: expected frames of at least 1 byte, got 0");
  while ((frame_bytes << (block_shift_ + 1)) <= kBlockBytes) ++block_shift_;
  if (!path.empty()) file_ = std::make_unique<ScratchFile>(path);
}

std::size_t FrameArena::bytes_used() const noexcept {
  return counts_.size() * frame_bytes_ + counts_.capacity() * sizeof(std::uint32_t) + free_.capacity() * sizeof(FrameId);
}

void FrameArena::reserve(std::size_t count) {
  while (free_.size() < count) {
    const std::size_t first = counts_.size();
    const std::size_t added = std::min(std::size_t{1} << block_shift_, max_frames_ - first);
    // All that can throw comes first. A page of the block is touched when a frame comes to it.
    grow(free_, first + added);
    grow(counts_, first + added);
    grow(blocks_, blocks_.size() + 1);
    if (file_) {
      const std::size_t bytes = (added * frame_bytes_ + kPageBytes - 1) / kPageBytes * kPageBytes;
      blocks_.emplace_back(*file_, file_->grow(bytes), bytes);
    } else {
      blocks_.emplace_back(added * frame_bytes_);
    }
    counts_.resize(first + added, 0);
    // Lowest id on top of the stack, so that a block fills from its start.
    for (std::size_t id = first + added; id-- > first;) free_.push_back(static_cast<FrameId>(id));
  }
}

}  // namespace rlv2v
