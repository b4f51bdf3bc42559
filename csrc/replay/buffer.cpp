#include "replay/buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace rlv2v {
namespace {

constexpr std::size_t kMaxTransitions = std::size_t{1} << 31;
constexpr std::size_t kMaxLen = (std::size_t{1} << 30) - 1;
constexpr std::size_t kMaxSteps = std::size_t{1} << 20;
constexpr std::size_t kChunk = 256;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("replay: " + message); }

std::size_t num_new_frames(const Window& window) { return window.clip == kNoClip ? window.length : 0; }

std::size_t num_new_frames(const Transition& transition) {
  return num_new_frames(transition.state) + num_new_frames(transition.action) + num_new_frames(transition.true_frame);
}

void check_count(const char* name, std::size_t value, std::size_t max) {
  if (value >= 1 && value <= max) return;
  refuse(std::string(name) + " must be in 1.." + std::to_string(max) + ", got " + std::to_string(value));
}

const BufferConfig& checked(const BufferConfig& config) {
  check_count("capacity", config.capacity, kMaxTransitions);
  check_count("max_len", config.max_len, kMaxLen);
  check_count("n_step", config.n_step, kMaxSteps);
  if (config.max_frames < config.max_len + 2) {
    refuse("memory must have room for max_len + 2 = " + std::to_string(config.max_len + 2) + " frames, got room for " +
           std::to_string(config.max_frames) + "; raise max_bytes");
  }
  check_exponent("alpha", config.alpha);
  check_exponent("beta", config.beta);
  check_exponent("gamma", config.gamma);
  return config;
}

}  // namespace

void check_exponent(const char* name, double value) {
  if (!(value >= 0.0 && value <= 1.0)) {
    refuse(std::string(name) + " must be in [0, 1], got " + std::to_string(value));
  }
}

void priorities_to_leaves(const float* priorities, float* leaves, std::size_t count, double alpha) noexcept {
  if (alpha == 0.0) {
    std::fill(leaves, leaves + count, 1.0F);
  } else {
    kernels().power(priorities, leaves, count, alpha);
  }
}

Buffer::Store::Store(const BufferConfig& config)
    : arena(config.frame_bytes, config.max_frames, config.path), tree(config.capacity),
      stride(Row::kBytes + (config.max_len + 2) * sizeof(FrameId)) {
  stride = stride <= 32 ? 32 : stride <= 64 ? 64 : (stride + 7) / 8 * 8;  // a short row lies within a cache line
  rows = Pages(config.capacity * stride);
}

Buffer::Buffer(const BufferConfig& config) : config_(checked(config)), store_(config_) {}

void Buffer::check_window(const Window& window, const char* name, std::size_t max_length) const {
  if (window.length < 1 || window.length > max_length) {
    refuse(std::string(name) + " must have 1.." + std::to_string(max_length) + " frames, got " +
           std::to_string(window.length));
  }
  if (window.clip == kNoClip) return;
  const auto clip = store_.clips.find(window.clip);
  if (clip == store_.clips.end()) {
    refuse(std::string(name) +
           " must refer to a clip that the buffer holds, got one that was released or replaced by a load");
  }
  const std::size_t frames = clip->second.size();
  if (window.start > frames || window.length > frames - window.start) {
    throw std::out_of_range("replay: " + std::string(name) + " refers to frames " + std::to_string(window.start) +
                            ".." + std::to_string(window.start + window.length - 1) + " of a clip of " +
                            std::to_string(frames));
  }
}

// Evicting transitions frees every frame that no clip holds, so only clips can take up the room.
void Buffer::check_memory(std::size_t frames) const {
  const std::size_t room = store_.arena.max_frames() - store_.num_clip_frames;
  if (frames > room) {
    refuse("memory is full: " + std::to_string(frames) + " frames are to be stored, clips leave room for " +
           std::to_string(room) + "; release clips or raise max_bytes");
  }
}

void Buffer::store_frames(const Window& window, FrameId* ids) noexcept {
  if (window.clip == kNoClip) {
    for (std::size_t k = 0; k < window.length; ++k) {
      ids[k] = store_.arena.store(window.frames + k * config_.frame_bytes);
    }
    return;
  }
  const std::vector<FrameId>& clip = store_.clips.find(window.clip)->second;
  for (std::size_t k = 0; k < window.length; ++k) {
    ids[k] = clip[window.start + k];
    store_.arena.retain(ids[k]);
  }
}

ClipId Buffer::put_clip(const std::uint8_t* frames, std::size_t num_frames) {
  const WriteLock locked(lock());
  if (num_frames < 1) refuse("a clip must have at least 1 frame, got 0");
  check_memory(num_frames);
  store_.arena.reserve(std::min(num_frames, store_.arena.num_free()));
  std::vector<FrameId> clip(num_frames);
  std::vector<FrameId>& stored = store_.clips[next_clip_];  // the last that can throw
  while (store_.arena.num_ready() < num_frames) evict_oldest();
  store_.tree.refresh();
  store_frames({kNoClip, 0, num_frames, frames}, clip.data());
  store_.arena.fence();
  stored = std::move(clip);
  store_.num_clip_frames += num_frames;
  return next_clip_++;
}

void Buffer::release_clip(ClipId id) noexcept {
  if (!guard_.in_owner()) return;  // a handle may end in a forked child, where the clip is not
  const WriteLock locked(lock());
  const auto clip = store_.clips.find(id);
  if (clip == store_.clips.end()) return;
  for (const FrameId frame : clip->second) store_.arena.release(frame);
  store_.num_clip_frames -= clip->second.size();
  store_.clips.erase(clip);
}

std::uint64_t Buffer::add(const std::vector<Transition>& batch) {
  const WriteLock locked(lock());
  std::size_t frames = 0;
  for (const Transition& transition : batch) {
    check_window(transition.state, "state", config_.max_len);
    check_window(transition.action, "action", 1);
    check_window(transition.true_frame, "true_frame", 1);
    if (!std::isfinite(transition.reward)) refuse("reward must be finite, got " + std::to_string(transition.reward));
    check_memory(num_new_frames(transition));
    frames += num_new_frames(transition);
  }
  // The only step that can fail comes before the first change. Evictions free what it cannot reserve.
  store_.arena.reserve(std::min(frames, store_.arena.num_free()));

  float leaf = 1.0F;
  priorities_to_leaves(&store_.max_priority, &leaf, 1, config_.alpha);
  const std::uint64_t first = store_.next_id;
  std::size_t index = slot(first);
  for (const Transition& transition : batch) {
    if (store_.next_id - store_.oldest_id == config_.capacity) evict_oldest();
    while (store_.arena.num_ready() < num_new_frames(transition)) evict_oldest();
    Row& row = store_.row(index);
    store_frames(transition.action, row.frames());
    store_frames(transition.true_frame, row.frames() + 1);
    store_frames(transition.state, row.frames() + 2);
    row.position = transition.position;
    row.reward = transition.reward;
    row.length = static_cast<std::uint32_t>(transition.state.length) & 0x3fffffffU;
    row.terminal = transition.terminal ? 1U : 0U;
    row.end = transition.end ? 1U : 0U;
    if (row.length < config_.max_len) ++store_.num_short;
    row.priority = store_.max_priority;
    store_.tree.set(index, leaf);
    ++store_.next_id;
    index = next_slot(index);
  }
  store_.arena.fence();
  store_.tree.refresh();
  return first;
}

// The caller refreshes the tree.
void Buffer::evict_oldest() noexcept {
  const std::size_t index = slot(store_.oldest_id++);
  const Row& row = store_.row(index);
  for (std::size_t k = 0; k < row.num_frames(); ++k) store_.arena.release(row.frames()[k]);
  if (row.length < config_.max_len) --store_.num_short;
  store_.tree.set(index, 0.0F);
}

template <class Real>
std::size_t Buffer::update_priorities(const std::int64_t* ids, const Real* priorities, std::size_t count) {
  const WriteLock locked(lock());
  constexpr auto kMax = static_cast<Real>(std::numeric_limits<float>::max());
  // Each value is read once: another thread of the caller that writes to it cannot undo the check.
  std::vector<std::size_t> slots(count);
  std::vector<float> values(count);
  const std::size_t oldest_slot = slot(store_.oldest_id);
  std::size_t live = 0;
  float max_priority = store_.max_priority;
  for (std::size_t k = 0; k < count; ++k) {
    const std::int64_t id = ids[k];
    const Real priority = priorities[k];
    if (id < 0 || static_cast<std::uint64_t>(id) >= store_.next_id) {
      throw std::out_of_range("replay: id must be one that add returned, 0.." + std::to_string(store_.next_id) +
                              " exclusive, got " + std::to_string(id));
    }
    if (!(priority >= 0 && priority <= kMax)) {
      refuse("priority must be finite in float32 and not negative, got " + std::to_string(priority));
    }
    if (static_cast<std::uint64_t>(id) < store_.oldest_id) continue;
    const std::size_t index = oldest_slot + static_cast<std::size_t>(static_cast<std::uint64_t>(id) - store_.oldest_id);
    slots[live] = index < config_.capacity ? index : index - config_.capacity;
    store_.tree.prefetch(slots[live]);
    __builtin_prefetch(&store_.row(slots[live]), 1);
    // A positive priority stays reachable: one below the normal range of f32 counts as the smallest normal number.
    const float smallest = priority > 0 ? std::numeric_limits<float>::min() : 0.0F;
    values[live] = std::max(static_cast<float>(priority), smallest);
    max_priority = std::max(max_priority, values[live]);
    ++live;
  }
  store_.max_priority = max_priority;
  float leaves[kChunk];
  for (std::size_t first = 0; first < live; first += kChunk) {
    const std::size_t chunk = std::min(kChunk, live - first);
    priorities_to_leaves(values.data() + first, leaves, chunk, config_.alpha);
    for (std::size_t k = 0; k < chunk; ++k) {
      store_.row(slots[first + k]).priority = values[first + k];
      store_.tree.set(slots[first + k], leaves[k]);
    }
  }
  store_.tree.refresh();
  store_.stale += count - live;
  return count - live;
}

template std::size_t Buffer::update_priorities(const std::int64_t*, const float*, std::size_t);
template std::size_t Buffer::update_priorities(const std::int64_t*, const double*, std::size_t);

std::size_t Buffer::num_slots() const noexcept {
  return static_cast<std::size_t>(std::min<std::uint64_t>(store_.next_id, config_.capacity));
}

double Buffer::alpha() const {
  const ReadLock locked(lock());
  return config_.alpha;
}

double Buffer::beta() const {
  const ReadLock locked(lock());
  return config_.beta;
}

void Buffer::set_alpha(double alpha) {
  const WriteLock locked(lock());
  check_exponent("alpha", alpha);
  if (alpha == config_.alpha) return;
  std::vector<float> leaves(num_slots(), 0.0F);
  float priorities[kChunk];
  float values[kChunk];
  for (std::uint64_t first = store_.oldest_id; first < store_.next_id; first += kChunk) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(kChunk, store_.next_id - first));
    for (std::size_t k = 0; k < count; ++k) priorities[k] = store_.row(slot(first + k)).priority;
    priorities_to_leaves(priorities, values, count, alpha);
    for (std::size_t k = 0; k < count; ++k) leaves[slot(first + k)] = values[k];
  }
  store_.tree.assign(leaves.data(), leaves.size());
  config_.alpha = alpha;
}

void Buffer::set_beta(double beta) {
  const WriteLock locked(lock());
  check_exponent("beta", beta);
  config_.beta = beta;
}

BufferStats Buffer::stats() const {
  const ReadLock locked(lock());
  std::size_t bytes = store_.arena.bytes_used() + store_.tree.bytes_used();
  bytes += num_slots() * store_.stride + store_.num_clip_frames * sizeof(FrameId);
  return {static_cast<std::size_t>(store_.next_id - store_.oldest_id), store_.arena.num_alive(), store_.clips.size(),
          store_.next_id, store_.oldest_id, sampled_.load(), store_.stale, store_.max_priority, bytes};
}

bool Buffer::consistent() const {
  const ReadLock locked(lock());
  std::unordered_map<FrameId, std::uint32_t> held;
  std::size_t num_short = 0;
  for (std::uint64_t id = store_.oldest_id; id < store_.next_id; ++id) {
    const Row& row = store_.row(slot(id));
    for (std::size_t k = 0; k < row.num_frames(); ++k) ++held[row.frames()[k]];
    if (row.length < config_.max_len) ++num_short;
    float leaf = 0.0F;
    priorities_to_leaves(&row.priority, &leaf, 1, config_.alpha);
    if (store_.tree.leaf(slot(id)) != leaf) return false;
  }
  for (const auto& clip : store_.clips) {
    for (const FrameId frame : clip.second) ++held[frame];
  }
  if (held.size() != store_.arena.num_alive() || num_short != store_.num_short) return false;
  for (const auto& frame : held) {
    if (store_.arena.references(frame.first) != frame.second) return false;
  }
  return store_.tree.consistent();
}

}  // namespace rlv2v
