#include "replay/buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "replay/draws.h"

namespace rlv2v {
namespace {

constexpr std::size_t kMostTransitions = std::size_t{1} << 31;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("replay: " + message); }

std::size_t num_new(const Window& window) { return window.clip == kNoClip ? window.length : 0; }

std::size_t num_new(const Transition& transition) {
  return num_new(transition.state) + num_new(transition.action) + num_new(transition.true_frame);
}

const BufferConfig& checked(const BufferConfig& config) {
  if (config.capacity < 1 || config.capacity > kMostTransitions) {
    refuse("capacity must be in 1.." + std::to_string(kMostTransitions) + ", got " + std::to_string(config.capacity));
  }
  if (config.max_len < 1 || config.max_len > kMostFrames) {
    refuse("max_len must be in 1.." + std::to_string(kMostFrames) + ", got " + std::to_string(config.max_len));
  }
  if (config.max_frames < config.max_len + 2) {
    refuse("memory must have room for max_len + 2 = " + std::to_string(config.max_len + 2) + " frames, got room for " +
           std::to_string(config.max_frames) + "; raise max_bytes");
  }
  check_exponent("alpha", config.alpha);
  check_exponent("beta", config.beta);
  return config;
}

}  // namespace

void check_exponent(const char* name, double value) {
  if (!(value >= 0.0 && value <= 1.0)) {
    refuse(std::string(name) + " must be in [0, 1], got " + std::to_string(value));
  }
}

float leaf_of(float priority, double alpha) {
  if (alpha == 0.0) return 1.0F;
  return priority == 0.0F ? 0.0F : static_cast<float>(std::pow(static_cast<double>(priority), alpha));
}

Buffer::Store::Store(const BufferConfig& config)
    : arena(config.frame_bytes, config.max_frames), tree(config.capacity) {}

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

void Buffer::make_room(std::size_t frames) {
  while (store_.arena.num_free() < frames) evict_oldest();
  store_.arena.reserve(frames);
}

void Buffer::place(const Window& window, FrameId* out) {
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

void Buffer::copy_frames(const FrameId* ids, std::size_t count, std::size_t padded, std::uint8_t* out) const noexcept {
  const std::size_t bytes = config_.frame_bytes;
  for (std::size_t k = 0; k < count; ++k) std::memcpy(out + k * bytes, store_.arena.data(ids[k]), bytes);
  std::memset(out + count * bytes, 0, (padded - count) * bytes);
}

ClipId Buffer::put_clip(const std::uint8_t* frames, std::size_t num_frames) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (num_frames < 1) refuse("a clip must have at least 1 frame, got 0");
  check_memory(num_frames);
  std::vector<FrameId>& clip = store_.clips[next_clip_];
  try {
    clip.resize(num_frames);
    make_room(num_frames);
  } catch (...) {
    store_.clips.erase(next_clip_);
    throw;
  }
  place({kNoClip, 0, num_frames, frames}, clip.data());
  store_.num_clip_frames += num_frames;
  return next_clip_++;
}

void Buffer::release_clip(ClipId id) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = store_.clips.find(id);
  if (found == store_.clips.end()) return;
  for (const FrameId frame : found->second) store_.arena.release(frame);
  store_.num_clip_frames -= found->second.size();
  store_.clips.erase(found);
}

// ---- transitions -----------------------------------------------------------------------------------------------

std::uint64_t Buffer::add(const std::vector<Transition>& batch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Transition& transition : batch) {
    check_window(transition.state, "state", config_.max_len);
    check_window(transition.action, "action", 1);
    check_window(transition.true_frame, "true_frame", 1);
    if (!std::isfinite(transition.reward)) refuse("reward must be finite, got " + std::to_string(transition.reward));
    check_memory(num_new(transition));
  }
  const std::uint64_t first = store_.next_id;
  for (const Transition& transition : batch) add_one(transition);
  return first;
}

void Buffer::add_one(const Transition& transition) {
  const std::size_t where = slot(store_.next_id);
  if (where >= store_.records.size()) {  // slots fill in order, so this is one more
    store_.table.resize((where + 1) * stride());
    store_.records.resize(where + 1);
  }
  make_room(num_new(transition));
  if (store_.next_id - store_.oldest_id == config_.capacity) evict_oldest();

  FrameId* frames = store_.table.data() + where * stride();
  place(transition.action, frames);
  place(transition.true_frame, frames + 1);
  place(transition.state, frames + 2);
  store_.records[where] = {transition.position, transition.reward, store_.max_priority,
                           static_cast<std::uint32_t>(transition.state.length), transition.terminal};
  const float leaf = leaf_of(store_.max_priority, config_.alpha);
  store_.tree.update(&where, &leaf, 1);
  ++store_.next_id;
}

void Buffer::evict_oldest() noexcept {
  const std::size_t where = slot(store_.oldest_id++);
  const FrameId* frames = store_.table.data() + where * stride();
  for (std::size_t k = 0; k < store_.records[where].length + std::size_t{2}; ++k) store_.arena.release(frames[k]);
  const float zero = 0.0F;
  store_.tree.update(&where, &zero, 1);
}

void Buffer::sample(std::size_t n, const SampleOut& out) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (n < 1) refuse("sample must draw at least 1 transition, got 0");
  if (store_.next_id == store_.oldest_id) refuse("sample needs at least 1 transition, the buffer is empty");
  const double total = store_.tree.total();
  if (total <= 0.0) refuse("sample needs a priority above 0, all are 0");

  const Draws draws(config_.seed);
  std::vector<double> points(n);
  std::vector<std::size_t> slots(n);
  for (std::size_t k = 0; k < n; ++k) {
    const double u = draws.uniform(store_.sampled + k);
    points[k] = config_.stratified ? total * ((static_cast<double>(k) + u) / static_cast<double>(n)) : total * u;
  }
  store_.tree.find(points.data(), slots.data(), n);
  store_.sampled += n;

  const double low = static_cast<double>(store_.tree.least_positive());
  const std::size_t oldest_slot = slot(store_.oldest_id);
  const std::size_t bytes = config_.frame_bytes;
  const std::size_t len = config_.max_len;
  for (std::size_t k = 0; k < n; ++k) {
    const std::size_t where = slots[k];
    const Record& record = store_.records[where];
    const FrameId* frames = store_.table.data() + where * stride();
    const std::size_t age = (where + config_.capacity - oldest_slot) % config_.capacity;
    std::uint8_t* next_state = out.next_states + k * (len + 1) * bytes;
    copy_frames(frames, 1, 1, out.actions + k * bytes);
    copy_frames(frames + 1, 1, 1, out.true_frames + k * bytes);
    copy_frames(frames + 2, record.length, len, out.states + k * len * bytes);
    copy_frames(frames + 2, record.length, len + 1, next_state);
    copy_frames(frames, 1, 1, next_state + record.length * bytes);
    out.lengths[k] = record.length;
    out.rewards[k] = record.reward;
    out.positions[k] = record.position;
    out.terminals[k] = record.terminal;
    out.ids[k] = static_cast<std::int64_t>(store_.oldest_id + age);
    out.weights[k] = static_cast<float>(std::pow(low / static_cast<double>(store_.tree.leaf(where)), config_.beta));
  }
}

std::size_t Buffer::update_priorities(const std::int64_t* ids, const double* priorities, std::size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::size_t k = 0; k < count; ++k) {
    if (ids[k] < 0 || static_cast<std::uint64_t>(ids[k]) >= store_.next_id) {
      throw std::out_of_range("replay: id must be one that add returned, 0.." + std::to_string(store_.next_id) +
                              " exclusive, got " + std::to_string(ids[k]));
    }
    if (!(priorities[k] >= 0.0 && priorities[k] <= static_cast<double>(std::numeric_limits<float>::max()))) {
      refuse("priority must be finite in float32 and not negative, got " + std::to_string(priorities[k]));
    }
  }
  std::vector<std::size_t> slots;
  std::vector<float> leaves;
  slots.reserve(count);
  leaves.reserve(count);
  for (std::size_t k = 0; k < count; ++k) {
    const auto id = static_cast<std::uint64_t>(ids[k]);
    if (id < store_.oldest_id) continue;
    auto priority = static_cast<float>(priorities[k]);
    // A positive priority stays reachable: below the normal range of f32 it counts as the least normal number.
    if (priorities[k] > 0.0) priority = std::max(priority, std::numeric_limits<float>::min());
    store_.records[slot(id)].priority = priority;
    store_.max_priority = std::max(store_.max_priority, priority);
    slots.push_back(slot(id));
    leaves.push_back(leaf_of(priority, config_.alpha));
  }
  store_.tree.update(slots.data(), leaves.data(), slots.size());
  store_.stale += count - slots.size();
  return count - slots.size();
}

// ---- settings and figures --------------------------------------------------------------------------------------

double Buffer::alpha() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return config_.alpha;
}

double Buffer::beta() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return config_.beta;
}

void Buffer::set_alpha(double alpha) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_exponent("alpha", alpha);
  if (alpha == config_.alpha) return;
  std::vector<float> leaves(store_.records.size(), 0.0F);
  for (std::uint64_t id = store_.oldest_id; id < store_.next_id; ++id) {
    leaves[slot(id)] = leaf_of(store_.records[slot(id)].priority, alpha);
  }
  store_.tree.assign(leaves.data(), leaves.size());
  config_.alpha = alpha;
}

void Buffer::set_beta(double beta) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_exponent("beta", beta);
  config_.beta = beta;
}

BufferStats Buffer::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t bytes = store_.arena.bytes_used() + store_.tree.bytes_used();
  bytes += store_.records.capacity() * sizeof(Record) + store_.table.capacity() * sizeof(FrameId);
  bytes += store_.num_clip_frames * sizeof(FrameId);
  return {static_cast<std::size_t>(store_.next_id - store_.oldest_id),
          store_.arena.num_alive(),
          store_.clips.size(),
          store_.next_id,
          store_.oldest_id,
          store_.sampled,
          store_.stale,
          store_.max_priority,
          bytes};
}

bool Buffer::consistent() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unordered_map<FrameId, std::uint32_t> held;
  for (std::uint64_t id = store_.oldest_id; id < store_.next_id; ++id) {
    const FrameId* frames = store_.table.data() + slot(id) * stride();
    for (std::size_t k = 0; k < store_.records[slot(id)].length + std::size_t{2}; ++k) ++held[frames[k]];
    if (store_.tree.leaf(slot(id)) != leaf_of(store_.records[slot(id)].priority, config_.alpha)) return false;
  }
  for (const auto& clip : store_.clips) {
    for (const FrameId frame : clip.second) ++held[frame];
  }
  if (held.size() != store_.arena.num_alive()) return false;
  for (const auto& frame : held) {
    if (store_.arena.references(frame.first) != frame.second) return false;
  }
  return store_.tree.consistent();
}

}  // namespace rlv2v
