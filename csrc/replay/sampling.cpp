// Buffer::sample: draws points, descends the tree, and writes the rows.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "replay/buffer.h"
#include "replay/draws.h"

namespace rlv2v {
namespace {

constexpr std::size_t kChunk = 256;
constexpr std::size_t kSmallFrame = 256;                     // bytes; larger ones are left to the CPU's own prefetch
constexpr std::size_t kMinStreamed = std::size_t{8} << 20;  // bytes of a batch that would sweep the caches clean

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 64 == 0; }

}  // namespace

bool Buffer::sample(std::size_t n, const SampleOut& out, bool may_share) {
  const ReadLock locked(lock());
  if (n < 1) throw std::invalid_argument("replay: sample must draw at least 1 transition, got 0");
  if (store_.next_id == store_.oldest_id) {
    throw std::invalid_argument("replay: sample needs at least 1 transition, the buffer is empty");
  }
  if (store_.tree.total() <= 0.0) throw std::invalid_argument("replay: sample needs a priority above 0, all are 0");
  const bool shared = may_share && config_.n_step == 1 && store_.num_short == 0;
  draw(n, sampled_.fetch_add(n), shared, out);
  return shared;
}

void Buffer::draw(std::size_t n, std::uint64_t first_draw, bool shared, const SampleOut& out) const noexcept {
  const Kernels& run = kernels();
  const std::uint64_t key = draws_key(config_.seed);
  const double total = store_.tree.total();
  const double part = total / static_cast<double>(n);
  const auto low = static_cast<double>(store_.tree.min_positive());
  const std::size_t oldest_slot = slot(store_.oldest_id);
  const std::size_t bytes = config_.frame_bytes;
  const bool streamed = n * (2 * config_.max_len + 3) * bytes >= kMinStreamed && bytes % 64 == 0 &&
                        aligned(out.states) && aligned(out.next_states) && aligned(out.actions) &&
                        aligned(out.true_frames);
  double points[kChunk];
  std::uint32_t slots[kChunk];
  float leaves[kChunk];
  const Row* lasts[kChunk];
  for (std::size_t first = 0; first < n; first += kChunk) {
    const std::size_t count = std::min(kChunk, n - first);
    run.uniform(key, first_draw + first, points, count);
    for (std::size_t k = 0; k < count; ++k) {
      points[k] = config_.stratified ? part * (static_cast<double>(first + k) + points[k]) : total * points[k];
    }
    store_.tree.find(points, slots, leaves, count);
    for (std::size_t k = 0; k < count; ++k) __builtin_prefetch(&store_.row(slots[k]));
    run.importance_weights(leaves, out.weights + first, count, low, config_.beta);
    for (std::size_t k = 0; k < count; ++k) {
      const std::size_t index = slots[k];
      const std::size_t age = index >= oldest_slot ? index - oldest_slot : index + config_.capacity - oldest_slot;
      lasts[k] = &write_numbers(first + k, index, store_.oldest_id + age, out);
      if (bytes > kSmallFrame) continue;
      const Row& row = store_.row(index);
      for (std::size_t j = 0; j < row.num_frames(); ++j) __builtin_prefetch(store_.arena.data(row.frames()[j]));
    }
    for (std::size_t k = 0; k < count; ++k) {
      write_frames(first + k, store_.row(slots[k]), *lasts[k], {streamed, shared}, out);
    }
  }
  if (streamed) run.fence();
}

// Writes everything but the frames; returns the row of the last of the n steps.
const Buffer::Row& Buffer::write_numbers(std::size_t k, std::size_t slot, std::uint64_t id,
                                         const SampleOut& out) const noexcept {
  const Row& row = store_.row(slot);
  const Row* last = &row;
  double reward = static_cast<double>(row.reward);
  double discount = config_.gamma;
  std::uint64_t next = id + 1;
  for (std::size_t step = 1; step < config_.n_step && last->terminal == 0 && last->end == 0 && next < store_.next_id;
       ++step) {
    slot = next_slot(slot);
    last = &store_.row(slot);
    reward += discount * static_cast<double>(last->reward);
    discount *= config_.gamma;
    ++next;
  }
  out.lengths[k] = row.length;
  out.rewards[k] = static_cast<float>(reward);
  out.next_lengths[k] = std::int64_t{last->length} + 1;
  out.discounts[k] = static_cast<float>(discount);
  out.positions[k] = row.position;
  out.terminals[k] = last->terminal != 0;
  out.ids[k] = static_cast<std::int64_t>(id);
  return *last;
}

void Buffer::write_frames(std::size_t k, const Row& row, const Row& last, CopyMode mode,
                          const SampleOut& out) const noexcept {
  const Kernels& run = kernels();
  const std::size_t bytes = config_.frame_bytes;
  const std::size_t len = config_.max_len;
  const auto copy = [&](std::uint8_t* to, FrameId frame) {
    if (mode.streamed) {
      run.stream(to, nullptr, store_.arena.data(frame), bytes);
    } else {
      copy_bytes(to, store_.arena.data(frame), bytes);
    }
  };
  const FrameId* frames = row.frames();
  const FrameId* next_frames = last.frames();
  std::uint8_t* state = out.states + k * len * bytes;
  std::uint8_t* next_state = out.next_states + k * (len + 1) * bytes;
  const bool together =
      mode.streamed && !mode.shared && &last == &row;  // each frame is read once, in the arena's order
  for (std::size_t j = 0; j < row.length && !mode.shared; ++j) {
    if (together) {
      run.stream(state + j * bytes, next_state + j * bytes, store_.arena.data(frames[2 + j]), bytes);
    } else {
      copy(state + j * bytes, frames[2 + j]);
    }
  }
  for (std::size_t j = 0; j < last.length && !together; ++j) copy(next_state + j * bytes, next_frames[2 + j]);
  copy(next_state + last.length * bytes, next_frames[0]);
  if (!mode.shared) copy(out.actions + k * bytes, frames[0]);
  copy(out.true_frames + k * bytes, frames[1]);
  if (mode.shared) return;
  const auto clear = [&](std::uint8_t* frames_out, std::size_t from, std::size_t to) {
    if (from < to) std::memset(frames_out + from * bytes, 0, (to - from) * bytes);
  };
  clear(state, row.length, len);
  clear(next_state, last.length + std::size_t{1}, len + 1);
}

}  // namespace rlv2v
