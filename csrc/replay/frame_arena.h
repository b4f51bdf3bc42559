// Frame arena: each uint8 frame is stored once and counted by its references; a frame without one is free for reuse.
//
// Memory grows in blocks of about two mebibytes, up to max_frames, and is kept for reuse: addresses never move. The frame that
// is free for longest is used first, so that the frames of a clip stay side by side, as readers like them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "replay/kernels.h"
#include "pages.h"

namespace rlv2v {

using FrameId = std::uint32_t;
// Ids fit in an int32, the type in which they are saved.
constexpr std::size_t kMostFrames = (std::size_t{1} << 31) - 1;

// memcpy for frames that may be a few bytes, for which a call costs more than the copy.
inline void copy_bytes(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) noexcept {
  if (bytes > 64) {
    std::memcpy(to, from, bytes);
  } else if (bytes >= 16) {
    for (std::size_t at = 0; at + 16 < bytes; at += 16) std::memcpy(to + at, from + at, 16);
    std::memcpy(to + bytes - 16, from + bytes - 16, 16);
  } else {
    for (std::size_t at = 0; at < bytes; ++at) to[at] = from[at];
  }
}

class FrameArena {
 public:
  // frame_bytes: size of one frame, at least 1. max_frames: most frames alive at once. path: a scratch file to keep them
  // in, which must not exist; empty for memory.
  FrameArena(std::size_t frame_bytes, std::size_t max_frames, const std::string& path);

  std::size_t frame_bytes() const noexcept { return frame_bytes_; }
  std::size_t max_frames() const noexcept { return max_frames_; }
  std::size_t num_alive() const noexcept { return counts_.size() - num_ready_; }
  // Frames that can be stored without more memory.
  std::size_t num_ready() const noexcept { return num_ready_; }
  // Frames that can be stored before the bound is met.
  std::size_t num_free() const noexcept { return max_frames_ - num_alive(); }
  std::size_t bytes_used() const noexcept;
  const std::uint8_t* data(FrameId id) const noexcept { return address(id); }
  std::uint32_t references(FrameId id) const noexcept { return counts_[id]; }
  // Ids in use are below this.
  std::size_t num_ids() const noexcept { return counts_.size(); }

  // Makes num_ready() at least count. Precondition: count <= num_free().
  // Throws std::bad_alloc or std::system_error (a full disk), with nothing lost.
  void reserve(std::size_t count);

  // Copies one frame in, with one reference; a large one past the caches, so that fence() must follow before other threads
  // read it. Precondition: num_ready() > 0.
  FrameId store(const std::uint8_t* frame) noexcept {
    const FrameId id = free_[first_free_];
    first_free_ = after(first_free_, 1);
    --num_ready_;
    counts_[id] = 1;
    if (streamed_) {
      kernels().stream(address(id), frame, frame_bytes_);
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
    if (--counts_[id] == 0) free_[after(first_free_, num_ready_++)] = id;
  }

 private:
  std::uint8_t* address(FrameId id) const noexcept {
    return blocks_[id >> block_shift_].data() + (id & ((FrameId{1} << block_shift_) - 1)) * frame_bytes_;
  }

  std::size_t after(std::size_t at, std::size_t steps) const noexcept {
    return at + steps < free_.size() ? at + steps : at + steps - free_.size();
  }

  std::size_t frame_bytes_;
  std::size_t max_frames_;
  bool streamed_;
  unsigned block_shift_ = 0;  // a block holds 2^block_shift_ frames
  std::unique_ptr<ScratchFile> file_;
  std::vector<Pages> blocks_;
  std::vector<std::uint32_t> counts_;  // references of every frame that has memory
  std::vector<FrameId> free_;          // as many entries, a ring: those with none, in the order in which they lost it
  std::size_t first_free_ = 0;
  std::size_t num_ready_ = 0;
};

}  // namespace rlv2v
