// Frame arena: each uint8 frame is stored once and counted by its references; a frame without any is free for reuse.
//
// Memory grows in blocks of about 2 MiB, up to max_frames, and is kept for reuse: addresses never move. The frame that
// has been free for longest is reused first, so the frames of a clip stay side by side, which makes reading them fast.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "pages.h"
#include "replay/kernels.h"

namespace rlv2v {

using FrameId = std::uint32_t;
// Ids fit in an int32, the type in which they are saved.
constexpr std::size_t kMaxFrames = (std::size_t{1} << 31) - 1;

// Copies as memcpy does, but without a call for frames of a few bytes, where it costs more than the copy.
inline void copy_bytes(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) noexcept {
  if (bytes > 64) {
    std::memcpy(to, from, bytes);
  } else if (bytes >= 16) {
    for (std::size_t k = 0; k + 16 < bytes; k += 16) std::memcpy(to + k, from + k, 16);
    std::memcpy(to + bytes - 16, from + bytes - 16, 16);
  } else {
    for (std::size_t k = 0; k < bytes; ++k) to[k] = from[k];
  }
}

class FrameArena {
 public:
  // frame_bytes: size of one frame, at least 1. max_frames: most frames alive at once. path: a scratch file to store
  // them in, which must not exist; empty: memory.
  FrameArena(std::size_t frame_bytes, std::size_t max_frames, const std::string& path);

  std::size_t frame_bytes() const noexcept { return frame_bytes_; }
  std::size_t max_frames() const noexcept { return max_frames_; }
  std::size_t num_alive() const noexcept { return counts_.size() - num_ready_; }
  // Frames that can be stored without more memory.
  std::size_t num_ready() const noexcept { return num_ready_; }
  // Frames that can be stored within max_frames.
  std::size_t num_free() const noexcept { return max_frames_ - num_alive(); }
  std::size_t bytes_used() const noexcept;
  const std::uint8_t* data(FrameId id) const noexcept { return address(id); }
  std::uint32_t references(FrameId id) const noexcept { return counts_[id]; }
  // Ids in use are below this.
  std::size_t num_ids() const noexcept { return counts_.size(); }

  // Makes num_ready() at least count. Precondition: count <= num_free().
  // Throws std::bad_alloc or std::system_error (a full disk), with nothing lost.
  void reserve(std::size_t count);

  // Stores a copy of one frame with one reference; a large one goes past the caches, so fence() must follow before
  // other threads read it. Precondition: num_ready() > 0.
  FrameId store(const std::uint8_t* frame) noexcept {
    const FrameId id = free_[first_free_];
    first_free_ = ring_index(1);
    --num_ready_;
    counts_[id] = 1;
    if (streamed_) {
      kernels().stream(address(id), nullptr, frame, frame_bytes_);
    } else {
      copy_bytes(address(id), frame, frame_bytes_);
    }
    return id;
  }
  void fence() const noexcept {
    if (streamed_) kernels().fence();
  }
  void retain(FrameId id) noexcept { ++counts_[id]; }
  void release(FrameId id) noexcept {
    if (--counts_[id] == 0) free_[ring_index(num_ready_++)] = id;
  }

 private:
  std::uint8_t* address(FrameId id) const noexcept {
    return blocks_[id >> block_shift_].data() + (id & ((FrameId{1} << block_shift_) - 1)) * frame_bytes_;
  }

  // Returns the place in free_ that is `steps` after the first.
  std::size_t ring_index(std::size_t steps) const noexcept {
    const std::size_t index = first_free_ + steps;
    return index < free_.size() ? index : index - free_.size();
  }

  std::size_t frame_bytes_;
  std::size_t max_frames_;
  bool streamed_;
  unsigned block_shift_ = 0;  // a block holds 2^block_shift_ frames
  std::unique_ptr<ScratchFile> file_;
  std::vector<Pages> blocks_;
  std::vector<std::uint32_t> counts_;  // references of every frame that has memory
  std::vector<FrameId> free_;          // a ring of as many entries: those without references, longest free first
  std::size_t first_free_ = 0;
  std::size_t num_ready_ = 0;
};

}  // namespace rlv2v
