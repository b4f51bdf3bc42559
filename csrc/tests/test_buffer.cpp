// Tests the buffer under the sanitizers: many wraparounds, bounded memory, a tree of several levels, hostile contents.
// What rows hold and what users' mistakes do is tested from Python.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.h"
#include "replay/buffer.h"
#include "rows.h"

using rlv2v::Buffer;
using rlv2v::BufferConfig;
using rlv2v::kNoClip;

namespace {

constexpr std::size_t kBytes = 6;
constexpr std::size_t kLen = 3;

BufferConfig config(std::size_t capacity, std::size_t max_frames = rlv2v::kMaxFrames, std::size_t n_step = 1) {
  return {capacity, kBytes, kLen, max_frames, 0.6, 0.4, true, 1, n_step, 0.5, ""};
}

std::vector<std::uint8_t> frames(std::size_t count, std::uint64_t id) {
  return std::vector<std::uint8_t>(count * kBytes, static_cast<std::uint8_t>(id * 37 % 251));
}

void add_one(Buffer& buffer, std::uint64_t id) {
  const auto data = frames(kLen, id);
  const rlv2v::Window frame{kNoClip, 0, 1, data.data()};
  CHECK(buffer.add({{{kNoClip, 0, 1 + id % kLen, data.data()}, frame, frame, static_cast<float>(id),
                     static_cast<std::int64_t>(id), false, false}}) == id);
}

Rows sampled(Buffer& buffer, std::size_t n) {
  Rows rows(n, kLen, kBytes);
  buffer.sample(n, rows.out());
  return rows;
}

void rows_come_after_wraparound() {
  for (const BufferConfig& settings : {config(7), config(7, rlv2v::kMaxFrames, 3), config(100, 12), config(1100)}) {
    Buffer buffer(settings);
    for (std::uint64_t id = 0; id < settings.capacity + 100; ++id) {
      add_one(buffer, id);
      sampled(buffer, 16);
      CHECK(buffer.consistent() && buffer.stats().frames <= settings.max_frames);
    }
    CHECK(settings.max_frames == 12 || buffer.stats().size == settings.capacity);
  }
}

void loading_restores_and_refuses() {
  Buffer buffer(config(5));
  for (std::uint64_t id = 0; id < 8; ++id) add_one(buffer, id);
  const std::int64_t ids[] = {4, 6};
  const double priorities[] = {0.25, 3.0};
  buffer.update_priorities(ids, priorities, 2);
  rlv2v::Contents saved = buffer.save();
  Buffer other(config(5));
  other.load(saved);
  CHECK(other.consistent());
  const Rows ours = sampled(buffer, 32), theirs = sampled(other, 32);
  CHECK(ours.ids == theirs.ids && ours.weights == theirs.weights && ours.next_states == theirs.next_states);

  const auto refused = [&](auto spoil) {
    rlv2v::Contents contents = buffer.save();
    spoil(contents);
    return throws<std::invalid_argument>([&] { other.load(contents); }) && other.consistent();
  };
  CHECK(refused([](auto& c) { c.table[0] = 1 << 20; }));
  CHECK(refused([](auto& c) { c.table[1] = -1; }));
  CHECK(refused([](auto& c) { c.lengths[2] = 4; }));  // of a full state: all it refers to is in the table
  CHECK(refused([](auto& c) { c.lengths = rlv2v::PageArray<std::int64_t>(6); }));
  CHECK(refused([](auto& c) { c.frames = rlv2v::PageArray<std::uint8_t>(c.frames.size() - 1); }));
  CHECK(refused([](auto& c) { c.priorities[0] = -1.0F; }));
  CHECK(refused([](auto& c) { c.ends[0] = 2; }));
  CHECK(refused([](auto& c) { c.alpha = 2.0; }));
  CHECK(refused([](auto& c) { c.oldest_id = ~std::uint64_t{0}; }));
  CHECK(other.stats().added == 8);
}

// Frames of a mebibyte come two a block, so that memory grows while some of it waits for reuse.
void the_arena_grows_around_what_it_holds() {
  constexpr std::size_t kFrame = std::size_t{1} << 20;
  rlv2v::FrameArena arena(kFrame, 64, "");
  std::vector<std::uint8_t> frame(kFrame);
  std::vector<std::pair<rlv2v::FrameId, std::uint8_t>> held;
  std::uint8_t value = 0;
  for (std::size_t round = 0; round < 40; ++round) {
    const std::size_t wanted = 1 + round % 5;
    arena.reserve(wanted);
    for (std::size_t k = 0; k < wanted && arena.num_ready() > round % 2; ++k) {
      std::fill(frame.begin(), frame.end(), ++value);
      held.emplace_back(arena.store(frame.data()), value);
    }
    for (std::size_t k = 0; k < 1 + round % 4 && held.size() > 1; ++k) {
      arena.release(held[k % 2].first);
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(k % 2));
    }
    CHECK(arena.num_alive() == held.size());
    for (const auto& one : held) {
      CHECK(arena.references(one.first) == 1 && arena.data(one.first)[0] == one.second &&
            arena.data(one.first)[kFrame - 1] == one.second);
    }
  }
  CHECK(arena.num_ids() > 4);
}

}  // namespace

int main() {
  rows_come_after_wraparound();
  loading_restores_and_refuses();
  the_arena_grows_around_what_it_holds();
  return 0;
}
