// Saving and loading a buffer's contents: Buffer::save, Buffer::load and the check of contents that may be hostile.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "replay/buffer.h"

namespace rlv2v {
namespace {

constexpr std::uint64_t kMostIds = std::uint64_t{1} << 62;

void expect(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("replay contents: " + message);
}

void expect_size(const char* name, std::size_t got, std::size_t expected) {
  expect(got == expected, std::string(name) + " must have " + std::to_string(expected) + " entries, got " + std::to_string(got));
}

}  // namespace

Contents Buffer::save() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto size = static_cast<std::size_t>(store_.next_id - store_.oldest_id);
  Contents out{};
  out.table.assign(size * stride(), -1);
  out.oldest_id = store_.oldest_id;
  out.sampled = store_.sampled;
  out.stale = store_.stale;
  out.seed = config_.seed;
  out.alpha = config_.alpha;
  out.beta = config_.beta;
  out.max_priority = store_.max_priority;
  out.stratified = config_.stratified;

  // Frames are numbered in the order in which transitions meet them.
  std::unordered_map<FrameId, std::int32_t> number;
  for (std::size_t k = 0; k < size; ++k) {
    const std::size_t where = slot(store_.oldest_id + k);
    const Record& record = store_.records[where];
    for (std::size_t j = 0; j < record.length + std::size_t{2}; ++j) {
      const FrameId frame = store_.table[where * stride() + j];
      out.table[k * stride() + j] = number.emplace(frame, static_cast<std::int32_t>(number.size())).first->second;
    }
    out.lengths.push_back(record.length);
    out.rewards.push_back(record.reward);
    out.positions.push_back(record.position);
    out.terminals.push_back(record.terminal ? 1 : 0);
    out.priorities.push_back(record.priority);
  }
  out.frames.resize(number.size() * config_.frame_bytes);
  for (const auto& [frame, index] : number) {
    const std::uint8_t* data = store_.arena.data(frame);
    std::copy(data, data + config_.frame_bytes,
              out.frames.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(index) * config_.frame_bytes));
  }
  return out;
}

void Buffer::check_contents(const Contents& contents) const {
  const std::size_t size = contents.lengths.size();
  expect(size <= config_.capacity,
         "at most capacity = " + std::to_string(config_.capacity) + " transitions, got " + std::to_string(size));
  expect_size("table", contents.table.size(), size * stride());
  expect_size("rewards", contents.rewards.size(), size);
  expect_size("positions", contents.positions.size(), size);
  expect_size("terminals", contents.terminals.size(), size);
  expect_size("priorities", contents.priorities.size(), size);
  expect(contents.frames.size() % config_.frame_bytes == 0, "frames must be whole");
  const std::size_t num_frames = contents.frames.size() / config_.frame_bytes;
  expect(num_frames <= store_.arena.max_frames(), "at most " + std::to_string(store_.arena.max_frames()) +
                                                      " frames fit in memory, got " + std::to_string(num_frames));
  expect(contents.oldest_id <= kMostIds && contents.sampled <= kMostIds && contents.stale <= kMostIds,
         "counters must be in 0..2^62");
  expect(std::isfinite(contents.max_priority) && contents.max_priority >= 1.0F, "max_priority must be finite, at least 1");
  check_exponent("alpha", contents.alpha);
  check_exponent("beta", contents.beta);
  for (std::size_t k = 0; k < size; ++k) {
    const std::int64_t length = contents.lengths[k];
    expect(length >= 1 && static_cast<std::size_t>(length) <= config_.max_len,
           "lengths must be in 1.." + std::to_string(config_.max_len) + ", got " + std::to_string(length));
    for (std::size_t j = 0; j < static_cast<std::size_t>(length) + 2; ++j) {
      const std::int32_t frame = contents.table[k * stride() + j];
      expect(frame >= 0 && static_cast<std::size_t>(frame) < num_frames,
             "table must refer to frames 0.." + std::to_string(num_frames) + " exclusive, got " + std::to_string(frame));
    }
    expect(std::isfinite(contents.rewards[k]), "rewards must be finite");
    expect(contents.terminals[k] <= 1, "terminals must be 0 or 1, got " + std::to_string(contents.terminals[k]));
    const float priority = contents.priorities[k];
    expect(priority == 0.0F || (priority >= std::numeric_limits<float>::min() && priority <= contents.max_priority),
           "priorities must be 0 or normal numbers up to max_priority, got " + std::to_string(priority));
  }
}

void Buffer::load(const Contents& contents) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_contents(contents);
  const std::size_t size = contents.lengths.size();
  const std::size_t num_frames = contents.frames.size() / config_.frame_bytes;

  Store fresh(config_);
  fresh.oldest_id = contents.oldest_id;
  fresh.next_id = contents.oldest_id + size;
  fresh.sampled = contents.sampled;
  fresh.stale = contents.stale;
  fresh.max_priority = contents.max_priority;
  const auto num_slots = static_cast<std::size_t>(std::min<std::uint64_t>(fresh.next_id, config_.capacity));
  fresh.records.resize(num_slots);
  fresh.table.resize(num_slots * stride());
  std::vector<float> leaves(num_slots, 0.0F);

  fresh.arena.reserve(num_frames);
  std::vector<FrameId> ids(num_frames);
  for (std::size_t k = 0; k < num_frames; ++k) {
    ids[k] = fresh.arena.store(contents.frames.data() + k * config_.frame_bytes);
  }
  for (std::size_t k = 0; k < size; ++k) {
    const std::size_t where = slot(fresh.oldest_id + k);
    const auto length = static_cast<std::uint32_t>(contents.lengths[k]);
    for (std::size_t j = 0; j < length + std::size_t{2}; ++j) {
      const FrameId id = ids[static_cast<std::size_t>(contents.table[k * stride() + j])];
      fresh.table[where * stride() + j] = id;
      fresh.arena.retain(id);
    }
    fresh.records[where] = {contents.positions[k], contents.rewards[k], contents.priorities[k], length,
                            contents.terminals[k] != 0};
    leaves[where] = leaf_of(contents.priorities[k], contents.alpha);
  }
  for (const FrameId id : ids) fresh.arena.release(id);  // transitions hold them now; a frame that none uses goes free
  fresh.tree.assign(leaves.data(), leaves.size());

  store_ = std::move(fresh);
  config_.seed = contents.seed;
  config_.alpha = contents.alpha;
  config_.beta = contents.beta;
  config_.stratified = contents.stratified;
}

}  // namespace rlv2v
