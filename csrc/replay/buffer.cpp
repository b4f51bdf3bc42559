#include "replay/buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace rlv2v {
namespace {

constexpr std::size_t kMostTransitions = std::size_t{1} << 31;
constexpr std::size_t kMostLen = (std::size_t{1} << 30) - 1;
constexpr std::size_t kMostSteps = std::size_t{1} << 20;
constexpr std::size_t kChunk = 256;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("replay: " + message); }

std::size_t num_new(const Window& window) { return window.clip == kNoClip ? window.length : 0; }

std::size_t num_new(const Transition& transition) {
  return num_new(transition.state) + num_new(transition.action) + num_new(transition.true_frame);
}

void check_count(const char* name, std::size_t value, std::size_t most) {
  if (value >= 1 && value <= most) return;
  refuse(std::string(name) + " must be in 1.." + std::to_string(most) + ", got " + std::to_string(value));
}

const BufferConfig& checked(const BufferConfig& config) {
  check_count("capacity", config.capacity, kMostTransitions);
  check_count("max_len", config.max_len, kMostLen);
  check_count("n_step", config.n_step, kMostSteps);
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

void leaves_of(const float* priorities, float* leaves, std::size_t count, double alpha) noexcept {
  if (alpha == 0.0) {
    std::fill(leaves, leaves + count, 1.0F);
  } else {
    kernels().power(priorities, leaves, count, alpha);
  }
}

std::size_t Buffer::Store::stride_of(std::size_t max_len) noexcept {
  const std::size_t bytes = Row::kBytes + (max_len + 2) * sizeof(FrameId);
  if (bytes <= 32) return 32;
  return bytes <= 64 ? 64 : (bytes + 7) / 8 * 8;
}

Buffer::Store::Store(const BufferConfig& config)
    : arena(config.frame_bytes, config.max_frames, config.path),
      tree(config.capacity),
      stride(stride_of(config.max_len)),
      rows(config.capacity * stride) {}

Buffer::Buffer(const BufferConfig& config) : config_(checked(config)), store_(config_) {}

// ---- frames ----------------------------------------------------------------------------------------------------

void Buffer::check_window(const Window& window, const char* name, std::size_t most) const {
  if (window.length < 1 || window.length > most) {
    refuse(std::string(name) + " must have 1.." + std::to_string(most) + " frames, got " +
           std::to_string(window.length));
  }
  if (window.clip == kNoClip) return;
  const auto found = store_.clips.find(window.clip);
  if (found == store_.clips.end()) {
    refuse(std::string(name) + " must refer to a clip that the buffer holds, got one that was released or replaced by a load");
  }
  const std::size_t frames = found->second.size();
  if (window.start > frames || window.length > frames - window.start) {
    throw std::out_of_range("replay: " + std::string(name) + " refers to frames " + std::to_string(window.start) +
                            ".." + std::to_string(window.start + window.length - 1) + " of a clip of " +
                            std::to_string(frames));
  }
}

// Evicting transitions frees every frame that no clip holds, so this is all that can stand in the way.
void Buffer::check_memory(std::size_t frames) const {
  const std::size_t room = store_.arena.max_frames() - store_.num_clip_frames;
  if (frames > room) {
    refuse("memory is full: " + std::to_string(frames) + " frames are to be stored, clips leave room for " +
           std::to_string(room) + "; release clips or raise max_bytes");
  }
}

void Buffer::place(const Window& window, FrameId* out) noexcept {
  if (window.clip == kNoClip) {
    for (std::size_t k = 0; k < window.length; ++k) {
      out[k] = store_.arena.store(window.frames + k * config_.frame_bytes);
    }
    return;
  }
  const std::vector<FrameId>& clip = store_.clips.find(window.clip)->second;
  for (std::size_t k = 0; k < window.length; ++k) {
    out[k] = clip[window.start + k];
    store_.arena.retain(out[k]);
  }
}

ClipId Buffer::put_clip(const std::uint8_t* frames, std::size_t num_frames) {
  const WriteLock locked(lock());
  if (num_frames < 1) refuse("a clip must have at least 1 frame, got 0");
  check_memory(num_frames);
  store_.arena.reserve(std::min(num_frames, store_.arena.num_free()));
  std::vector<FrameId> clip(num_frames);
  std::vector<FrameId>& kept = store_.clips[next_clip_];  // the last that can throw
  while (store_.arena.num_ready() < num_frames) evict_oldest();
  store_.tree.refresh();
  place({kNoClip, 0, num_frames, frames}, clip.data());
  store_.arena.fence();
  kept = std::move(clip);
  store_.num_clip_frames += num_frames;
  return next_clip_++;
}

void Buffer::release_clip(ClipId id) noexcept {
  if (!owner_.here()) return;  // a handle may die in a forked child, where the clip is not
  const WriteLock locked(lock());
  const auto found = store_.clips.find(id);
  if (found == store_.clips.end()) return;
  for (const FrameId frame : found->second) store_.arena.release(frame);
  store_.num_clip_frames -= found->second.size();
  store_.clips.erase(found);
}

// ---- transitions -----------------------------------------------------------------------------------------------

std::uint64_t Buffer::add(const std::vector<Transition>& batch) {
  const WriteLock locked(lock());
  std::size_t frames = 0;
  for (const Transition& transition : batch) {
    check_window(transition.state, "state", config_.max_len);
    check_window(transition.action, "action", 1);
    check_window(transition.true_frame, "true_frame", 1);
    if (!std::isfinite(transition.reward)) refuse("reward must be finite, got " + std::to_string(transition.reward));
    check_memory(num_new(transition));
    frames += num_new(transition);
  }
  // The only step that can fail comes before the first change; what it could not get, evictions give.
  store_.arena.reserve(std::min(frames, store_.arena.num_free()));

  float leaf = 1.0F;
  leaves_of(&store_.max_priority, &leaf, 1, config_.alpha);
  const std::uint64_t first = store_.next_id;
  std::size_t where = slot(first);
  for (const Transition& transition : batch) {
    if (store_.next_id - store_.oldest_id == config_.capacity) evict_oldest();
    while (store_.arena.num_ready() < num_new(transition)) evict_oldest();
    Row& row = store_.row(where);
    place(transition.action, row.frames());
    place(transition.true_frame, row.frames() + 1);
    place(transition.state, row.frames() + 2);
    row.position = transition.position;
    row.reward = transition.reward;
    row.length = static_cast<std::uint32_t>(transition.state.length) & 0x3fffffffU;
    row.terminal = transition.terminal ? 1U : 0U;
    row.end = transition.end ? 1U : 0U;
    if (row.length < config_.max_len) ++store_.num_short;
    row.priority = store_.max_priority;
    store_.tree.set(where, leaf);
    ++store_.next_id;
    where = next_slot(where);
  }
  store_.arena.fence();
  store_.tree.refresh();
  return first;
}

// The tree is whole again after its refresh().
void Buffer::evict_oldest() noexcept {
  const std::size_t where = slot(store_.oldest_id++);
  const Row& row = store_.row(where);
  for (std::size_t k = 0; k < row.num_frames(); ++k) store_.arena.release(row.frames()[k]);
  if (row.length < config_.max_len) --store_.num_short;
  store_.tree.set(where, 0.0F);
}

template <class Real>
std::size_t Buffer::update_priorities(const std::int64_t* ids, const Real* priorities, std::size_t count) {
  const WriteLock locked(lock());
  constexpr auto kMost = static_cast<Real>(std::numeric_limits<float>::max());
  // Each value is read once: a thread of the caller's that writes it meanwhile cannot undo the check.
  std::vector<std::size_t> slots(count);
  std::vector<float> values(count);
  const std::size_t oldest_slot = slot(store_.oldest_id);
  std::size_t live = 0;
  float most = store_.max_priority;
  for (std::size_t k = 0; k < count; ++k) {
    const std::int64_t id = ids[k];
    const Real priority = priorities[k];
    if (id < 0 || static_cast<std::uint64_t>(id) >= store_.next_id) {
      throw std::out_of_range("replay: id must be one that add returned, 0.." + std::to_string(store_.next_id) +
                              " exclusive, got " + std::to_string(id));
    }
    if (!(priority >= 0 && priority <= kMost)) {
      refuse("priority must be finite in float32 and not negative, got " + std::to_string(priority));
    }
    if (static_cast<std::uint64_t>(id) < store_.oldest_id) continue;
    const std::size_t where = oldest_slot + static_cast<std::size_t>(static_cast<std::uint64_t>(id) - store_.oldest_id);
    slots[live] = where < config_.capacity ? where : where - config_.capacity;
    store_.tree.prefetch(slots[live]);
    __builtin_prefetch(&store_.row(slots[live]), 1);
    // A positive priority stays reachable: below the normal range of f32 it counts as the least normal number.
    const float least = priority > 0 ? std::numeric_limits<float>::min() : 0.0F;
    values[live] = std::max(static_cast<float>(priority), least);
    most = std::max(most, values[live]);
    ++live;
  }
  store_.max_priority = most;
  float leaves[kChunk];
  for (std::size_t first = 0; first < live; first += kChunk) {
    const std::size_t here = std::min(kChunk, live - first);
    leaves_of(values.data() + first, leaves, here, config_.alpha);
    for (std::size_t k = 0; k < here; ++k) {
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

// ---- settings and figures --------------------------------------------------------------------------------------

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
    leaves_of(priorities, values, count, alpha);
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
  return {static_cast<std::size_t>(store_.next_id - store_.oldest_id),
          store_.arena.num_alive(),
          store_.clips.size(),
          store_.next_id,
          store_.oldest_id,
          sampled_.load(),
          store_.stale,
          store_.max_priority,
          bytes};
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
    leaves_of(&row.priority, &leaf, 1, config_.alpha);
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
