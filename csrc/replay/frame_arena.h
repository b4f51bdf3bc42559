// Frame arena: each uint8 frame is stored once and counted by its references; a frame without one is free for reuse.
//
// Memory grows in blocks of about a mebibyte, up to max_frames, and is kept for reuse: addresses never move.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace rlv2v {

using FrameId = std::uint32_t;
// Ids fit in an int32, the type in which they are saved.
constexpr std::size_t kMostFrames = (std::size_t{1} << 31) - 1;

class FrameArena {
 public:
  // frame_bytes: size of one frame, at least 1. max_frames: most frames alive at once.
  FrameArena(std::size_t frame_bytes, std::size_t max_frames);

  std::size_t frame_bytes() const noexcept { return frame_bytes_; }
  std::size_t max_frames() const noexcept { return max_frames_; }
  std::size_t num_alive() const noexcept { return counts_.size() - free_.size(); }
  // Frames that can be stored before the bound is met.
  std::size_t num_free() const noexcept { return max_frames_ - num_alive(); }
  std::size_t bytes_used() const noexcept;
  const std::uint8_t* data(FrameId id) const noexcept;
  std::uint32_t references(FrameId id) const noexcept { return counts_[id]; }

  // Allocates so that the next count calls of store() cannot fail. Precondition: count <= num_free().
  // Throws std::bad_alloc, with nothing changed.
  void reserve(std::size_t count);

  // Copies one frame in, with one reference. Precondition: reserved.
  FrameId store(const std::uint8_t* frame) noexcept;
  void retain(FrameId id) noexcept { ++counts_[id]; }
  void release(FrameId id) noexcept;

 private:
  std::uint8_t* address(FrameId id) const noexcept;

  std::size_t frame_bytes_;
  std::size_t max_frames_;
  std::size_t block_frames_;
  std::vector<std::unique_ptr<std::uint8_t[]>> blocks_;
  std::vector<std::uint32_t> counts_;  // references of every frame that has memory
  std::vector<FrameId> free_;          // those with none
};

}  // namespace rlv2v
