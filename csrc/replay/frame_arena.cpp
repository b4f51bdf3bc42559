#include "replay/frame_arena.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace rlv2v {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{1} << 20;

// Doubles, so that many small growths cost linear time.
template <class T>
void grow(std::vector<T>& values, std::size_t size) {
  if (values.capacity() < size) values.reserve(std::max(size, 2 * values.capacity()));
}

}  // namespace

FrameArena::FrameArena(std::size_t frame_bytes, std::size_t max_frames)
    : frame_bytes_(frame_bytes), max_frames_(max_frames) {
  if (frame_bytes == 0) throw std::invalid_argument("frame arena: expected frames of at least 1 byte, got 0");
  max_frames_ = std::min(max_frames, kMostFrames);
  block_frames_ = std::max<std::size_t>(1, kBlockBytes / frame_bytes);
}

std::size_t FrameArena::bytes_used() const noexcept {
  return counts_.size() * frame_bytes_ + counts_.capacity() * sizeof(std::uint32_t) + free_.capacity() * sizeof(FrameId);
}

std::uint8_t* FrameArena::address(FrameId id) const noexcept {
  return blocks_[id / block_frames_].get() + (id % block_frames_) * frame_bytes_;
}

const std::uint8_t* FrameArena::data(FrameId id) const noexcept { return address(id); }

void FrameArena::reserve(std::size_t count) {
  while (free_.size() < count) {
    const std::size_t first = counts_.size();
    const std::size_t added = std::min(block_frames_, max_frames_ - first);
    // All that can throw comes first. The block stays uninitialised: a page is touched when a frame comes to it.
    std::unique_ptr<std::uint8_t[]> block(new std::uint8_t[added * frame_bytes_]);
    grow(free_, first + added);
    grow(counts_, first + added);
    blocks_.push_back(std::move(block));
    counts_.resize(first + added, 0);
    // Lowest id on top of the stack, so that a block fills from its start.
    for (std::size_t id = first + added; id-- > first;) free_.push_back(static_cast<FrameId>(id));
  }
}

FrameId FrameArena::store(const std::uint8_t* frame) noexcept {
  const FrameId id = free_.back();
  free_.pop_back();
  counts_[id] = 1;
  std::memcpy(address(id), frame, frame_bytes_);
  return id;
}

void FrameArena::release(FrameId id) noexcept {
  if (--counts_[id] == 0) free_.push_back(id);
}

}  // namespace rlv2v
