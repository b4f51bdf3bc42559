#include "replay/frame_arena.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace rlv2v {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{1} << 21;
constexpr std::size_t kMinStreamed = 4096;  // bytes of a frame that is not worth a place in the caches
constexpr std::size_t kPageBytes = std::size_t{1} << 16;  // a multiple of the page size of every common system

// Reserves a quarter more at least, so that many small growths cost linear time.
template <class T>
void grow(std::vector<T>& values, std::size_t size) {
  if (values.capacity() < size) values.reserve(std::max(size, values.capacity() + values.capacity() / 4));
}

}  // namespace

FrameArena::FrameArena(std::size_t frame_bytes, std::size_t max_frames, const std::string& path)
    : frame_bytes_(frame_bytes),
      max_frames_(std::min(max_frames, kMaxFrames)),
      streamed_(frame_bytes >= kMinStreamed && frame_bytes % 64 == 0) {
  if (frame_bytes == 0) throw std::invalid_argument("frame arena: expected frames of at least 1 byte, got 0");
  while ((frame_bytes << (block_shift_ + 1)) <= kBlockBytes) ++block_shift_;
  if (!path.empty()) file_ = std::make_unique<ScratchFile>(path);
}

std::size_t FrameArena::bytes_used() const noexcept {
  return counts_.size() * frame_bytes_ + counts_.capacity() * sizeof(std::uint32_t) +
         free_.capacity() * sizeof(FrameId);
}

void FrameArena::reserve(std::size_t count) {
  while (num_ready_ < count) {
    const std::size_t first = counts_.size();
    const std::size_t added = std::min(std::size_t{1} << block_shift_, max_frames_ - first);
    // All that can throw comes first. A page of the block is touched when a frame is stored in it.
    grow(free_, first + added);
    grow(counts_, first + added);
    grow(blocks_, blocks_.size() + 1);
    std::vector<FrameId> ready(first_free_ == 0 ? 0 : num_ready_);
    if (file_) {
      const std::size_t bytes = (added * frame_bytes_ + kPageBytes - 1) / kPageBytes * kPageBytes;
      blocks_.emplace_back(*file_, file_->grow(bytes), bytes);
    } else {
      blocks_.emplace_back(added * frame_bytes_);
    }
    counts_.resize(first + added, 0);
    for (std::size_t k = 0; k < ready.size(); ++k) ready[k] = free_[ring_index(k)];
    std::copy(ready.begin(), ready.end(), free_.begin());  // the ring begins at 0 from now on
    first_free_ = 0;
    free_.resize(first + added);
    for (std::size_t k = 0; k < added; ++k) free_[num_ready_++] = static_cast<FrameId>(first + k);
  }
}

}  // namespace rlv2v
