// Buffer::save, Buffer::load, and the check of contents, which may be hostile.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "replay/buffer.h"

namespace rlv2v {
namespace {

constexpr std::uint64_t kMaxIds = std::uint64_t{1} << 62;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("replay contents: " + message); }

void expect(bool condition, const std::string& message) {
  if (!condition) refuse(message);
}

void expect_size(const char* name, std::size_t got, std::size_t expected) {
  expect(got == expected,
         std::string(name) + " must have " + std::to_string(expected) + " entries, got " + std::to_string(got));
}

}  // namespace

Contents Buffer::save() const {
  const ReadLock locked(lock());
  const auto size = static_cast<std::size_t>(store_.next_id - store_.oldest_id);
  const std::size_t columns = config_.max_len + 2;
  const std::size_t bytes = config_.frame_bytes;
  Contents out;
  out.table = PageArray<std::int32_t>(size * columns);
  out.for_columns([size](const char*, auto& column) { column = std::decay_t<decltype(column)>(size); });
  out.oldest_id = store_.oldest_id;
  out.sampled = sampled_.load();
  out.stale = store_.stale;
  out.seed = config_.seed;
  out.alpha = config_.alpha;
  out.beta = config_.beta;
  out.max_priority = store_.max_priority;
  out.stratified = config_.stratified;

  // Frames are numbered in the order in which transitions refer to them first.
  std::vector<std::int32_t> numbers(store_.arena.num_ids(), -1);
  std::vector<FrameId> numbered;
  numbered.reserve(store_.arena.num_alive());
  for (std::size_t k = 0; k < size; ++k) {
    const Row& row = store_.row(slot(store_.oldest_id + k));
    for (std::size_t j = 0; j < row.num_frames(); ++j) {
      std::int32_t& number = numbers[row.frames()[j]];
      if (number < 0) {
        number = static_cast<std::int32_t>(numbered.size());
        numbered.push_back(row.frames()[j]);
      }
      out.table[k * columns + j] = number;
    }
    std::fill(&out.table[k * columns + row.num_frames()], &out.table[(k + 1) * columns], -1);
    out.lengths[k] = row.length;
    out.rewards[k] = row.reward;
    out.positions[k] = row.position;
    out.terminals[k] = row.terminal;
    out.ends[k] = row.end;
    out.priorities[k] = row.priority;
  }
  out.frames = PageArray<std::uint8_t>(numbered.size() * bytes);
  for (std::size_t k = 0; k < numbered.size(); ++k) {
    copy_bytes(out.frames.data() + k * bytes, store_.arena.data(numbered[k]), bytes);
  }
  return out;
}

void Buffer::check_contents(Contents& contents) const {
  const std::size_t size = contents.lengths.size();
  expect(size <= config_.capacity,
         "at most capacity = " + std::to_string(config_.capacity) + " transitions, got " + std::to_string(size));
  expect_size("table", contents.table.size(), size * (config_.max_len + 2));
  contents.for_columns([size](const char* name, const auto& column) { expect_size(name, column.size(), size); });
  expect(contents.frames.size() % config_.frame_bytes == 0, "frames must be complete");
  const std::size_t num_frames = contents.frames.size() / config_.frame_bytes;
  expect(num_frames <= store_.arena.max_frames(), "at most " + std::to_string(store_.arena.max_frames()) +
                                                      " frames fit in memory, got " + std::to_string(num_frames));
  expect(contents.oldest_id <= kMaxIds && contents.sampled <= kMaxIds && contents.stale <= kMaxIds,
         "counters must be in 0..2^62");
  expect(std::isfinite(contents.max_priority) && contents.max_priority >= 1.0F,
         "max_priority must be finite, at least 1");
  check_exponent("alpha", contents.alpha);
  check_exponent("beta", contents.beta);
  for (std::size_t k = 0; k < size; ++k) {  // no message is built before it is needed: there may be millions of rows
    const std::int64_t length = contents.lengths[k];
    if (length < 1 || static_cast<std::size_t>(length) > config_.max_len) {
      refuse("lengths must be in 1.." + std::to_string(config_.max_len) + ", got " + std::to_string(length));
    }
    for (std::size_t j = 0; j < static_cast<std::size_t>(length) + 2; ++j) {
      const std::int32_t frame = contents.table[k * (config_.max_len + 2) + j];
      if (frame < 0 || static_cast<std::size_t>(frame) >= num_frames) {
        refuse("table must refer to frames 0.." + std::to_string(num_frames) + " exclusive, got " +
               std::to_string(frame));
      }
    }
    if (!std::isfinite(contents.rewards[k])) refuse("rewards must be finite");
    if (contents.terminals[k] > 1) refuse("terminals must be 0 or 1, got " + std::to_string(contents.terminals[k]));
    if (contents.ends[k] > 1) refuse("ends must be 0 or 1, got " + std::to_string(contents.ends[k]));
    const float priority = contents.priorities[k];
    if (priority != 0.0F && !(priority >= std::numeric_limits<float>::min() && priority <= contents.max_priority)) {
      refuse("priorities must be 0 or normal numbers up to max_priority, got " + std::to_string(priority));
    }
  }
}

void Buffer::load(Contents& contents) {
  const WriteLock locked(lock());
  check_contents(contents);
  const std::size_t size = contents.lengths.size();
  const std::size_t num_frames = contents.frames.size() / config_.frame_bytes;
  const std::size_t columns = config_.max_len + 2;

  Store fresh(config_);
  fresh.oldest_id = contents.oldest_id;
  fresh.next_id = contents.oldest_id + size;
  fresh.stale = contents.stale;
  fresh.max_priority = contents.max_priority;
  fresh.arena.reserve(num_frames);
  std::vector<FrameId> ids(num_frames);
  for (std::size_t k = 0; k < num_frames; ++k) ids[k] = fresh.arena.store(&contents.frames[k * config_.frame_bytes]);
  fresh.arena.fence();
  std::vector<float> leaves(static_cast<std::size_t>(std::min<std::uint64_t>(fresh.next_id, config_.capacity)));
  std::vector<float> by_age(size);
  priorities_to_leaves(contents.priorities.data(), by_age.data(), size, contents.alpha);
  std::size_t index = slot(fresh.oldest_id);
  for (std::size_t k = 0; k < size; ++k) {
    Row& row = fresh.row(index);
    row.position = contents.positions[k];
    row.reward = contents.rewards[k];
    row.priority = contents.priorities[k];
    row.length = static_cast<std::uint32_t>(contents.lengths[k]) & 0x3fffffffU;
    row.terminal = contents.terminals[k] != 0 ? 1U : 0U;
    row.end = contents.ends[k] != 0 ? 1U : 0U;
    for (std::size_t j = 0; j < row.num_frames(); ++j) {
      row.frames()[j] = ids[static_cast<std::size_t>(contents.table[k * columns + j])];
      fresh.arena.retain(row.frames()[j]);
    }
    if (row.length < config_.max_len) ++fresh.num_short;
    leaves[index] = by_age[k];
    index = next_slot(index);
  }
  for (const FrameId id : ids) fresh.arena.release(id);  // transitions hold them now; a frame without one becomes free
  fresh.tree.assign(leaves.data(), leaves.size());

  store_ = std::move(fresh);
  sampled_ = contents.sampled;
  config_.seed = contents.seed;
  config_.alpha = contents.alpha;
  config_.beta = contents.beta;
  config_.stratified = contents.stratified;
}

}  // namespace rlv2v
