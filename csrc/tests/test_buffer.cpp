// Tests the buffer: frames after many wraparounds, reference counts, bounded memory, mistakes that change nothing.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.h"
#include "replay/buffer.h"
#include "rows.h"

using rlv2v::Buffer;
using rlv2v::BufferConfig;
using rlv2v::ClipId;
using rlv2v::kNoClip;
using rlv2v::Transition;

namespace {

constexpr std::size_t kBytes = 6;
constexpr std::size_t kLen = 3;

BufferConfig config(std::size_t capacity, std::size_t max_frames = rlv2v::kMaxFrames) {
  return {capacity, kBytes, kLen, max_frames, 0.6, 0.4, true, 1, 1, 0.5, ""};
}

std::vector<std::uint8_t> frames(std::size_t count, std::uint64_t id) {
  return std::vector<std::uint8_t>(count * kBytes, static_cast<std::uint8_t>(id * 37 % 251));
}

void add_one(Buffer& buffer, std::uint64_t id) {
  const auto data = frames(kLen, id);
  const Transition transition{{kNoClip, 0, 1 + id % kLen, data.data()},
                              {kNoClip, 0, 1, data.data()},
                              {kNoClip, 0, 1, data.data()},
                              static_cast<float>(id),
                              static_cast<std::int64_t>(id),
                              false,
                              false};
  CHECK(buffer.add({transition}) == id);
}

Rows sampled(Buffer& buffer, std::size_t n) {
  Rows rows(n, kLen, kBytes);
  buffer.sample(n, rows.out());
  return rows;
}

// Every row must hold the frames, length and numbers of its own id.
void check_rows(Buffer& buffer, std::size_t n) {
  const Rows rows = sampled(buffer, n);
  for (std::size_t k = 0; k < n; ++k) {
    const auto id = static_cast<std::uint64_t>(rows.ids[k]);
    const std::uint8_t value = frames(1, id)[0];
    const std::size_t length = 1 + id % kLen;
    CHECK(rows.lengths[k] == static_cast<std::int64_t>(length));
    CHECK(rows.positions[k] == rows.ids[k] && rows.rewards[k] == static_cast<float>(id));
    CHECK(rows.weights[k] > 0.0F && rows.weights[k] <= 1.0F);
    for (std::size_t j = 0; j < kLen * kBytes; ++j) {
      CHECK(rows.states[k * kLen * kBytes + j] == (j < length * kBytes ? value : 0));
    }
    for (std::size_t j = 0; j < (kLen + 1) * kBytes; ++j) {
      CHECK(rows.next_states[k * (kLen + 1) * kBytes + j] == (j < (length + 1) * kBytes ? value : 0));
    }
    for (std::size_t j = 0; j < kBytes; ++j) {
      CHECK(rows.actions[k * kBytes + j] == value && rows.true_frames[k * kBytes + j] == value);
    }
  }
}

void rows_are_right_after_wraparound() {
  Buffer buffer(config(7));
  for (std::uint64_t id = 0; id < 100; ++id) {
    add_one(buffer, id);
    check_rows(buffer, 16);
    CHECK(buffer.consistent());
  }
  CHECK(buffer.stats().size == 7);
}

void clips_live_as_long_as_they_are_used() {
  Buffer buffer(config(2));
  const auto data = frames(5, 1);
  const ClipId clip = buffer.put_clip(data.data(), 5);
  const Transition window{{clip, 1, 3, nullptr}, {clip, 0, 1, nullptr}, {clip, 4, 1, nullptr}, 0.0F, 0, false, false};
  buffer.add({window, window});
  CHECK(buffer.stats().frames == 5);
  buffer.release_clip(clip);
  buffer.release_clip(clip);
  CHECK(buffer.stats().frames == 5 && buffer.stats().clips == 0);
  CHECK(throws<std::invalid_argument>([&] { buffer.add({window}); }));
  add_one(buffer, 2);
  add_one(buffer, 3);
  CHECK(buffer.consistent());
  CHECK(buffer.stats().frames == 3 + 2 + 1 + 2);  // ids 2 and 3 have states of 3 and 1 frames
}

void memory_stays_in_its_bound() {
  Buffer buffer(config(100, 12));
  for (std::uint64_t id = 0; id < 50; ++id) {
    add_one(buffer, id);
    CHECK(buffer.stats().frames <= 12);
  }
  check_rows(buffer, 8);
  const auto data = frames(8, 0);
  const ClipId clip = buffer.put_clip(data.data(), 8);
  CHECK(throws<std::invalid_argument>([&] { buffer.put_clip(data.data(), 5); }));
  const auto stats = buffer.stats();
  CHECK(throws<std::invalid_argument>([&] { add_one(buffer, 53); }));  // needs 5 frames, there is room for 4
  CHECK(buffer.stats().size == stats.size && buffer.stats().added == stats.added);
  buffer.release_clip(clip);
  add_one(buffer, 50);
  CHECK(buffer.consistent());
}

void mistakes_change_nothing() {
  const double bad[] = {-1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN(), 1e39};
  Buffer buffer(config(4));
  CHECK(throws<std::invalid_argument>([&] { sampled(buffer, 4); }));
  for (std::uint64_t id = 0; id < 6; ++id) add_one(buffer, id);
  for (const double priority : bad) {
    const std::int64_t ids[] = {5, 4};
    const double priorities[] = {9.0, priority};
    CHECK(throws<std::invalid_argument>([&] { buffer.update_priorities(ids, priorities, 2); }));
  }
  for (const std::int64_t id : {std::int64_t{-1}, std::int64_t{6}, std::numeric_limits<std::int64_t>::max()}) {
    const double one = 1.0;
    CHECK(throws<std::out_of_range>([&] { buffer.update_priorities(&id, &one, 1); }));
  }
  CHECK(buffer.stats().max_priority == 1.0F);
  const std::int64_t all[] = {0, 2, 3, 4, 5};
  const double zeros[] = {0.0, 0.0, 0.0, 0.0, 0.0};
  CHECK(buffer.update_priorities(all, zeros, 5) == 1);
  CHECK(throws<std::invalid_argument>([&] { sampled(buffer, 4); }));
  buffer.set_alpha(0.0);
  check_rows(buffer, 64);
}

// Rewards id, gamma 0.5: id + (id + 1) / 2 + (id + 2) / 4, cut by an end, a terminal, or the newest.
void steps_stop_where_the_episode_does() {
  BufferConfig settings = config(8);
  settings.n_step = 3;
  Buffer buffer(settings);
  const auto data = frames(1, 1);
  for (std::uint64_t id = 0; id < 20; ++id) {
    const rlv2v::Window frame{kNoClip, 0, 1, data.data()};
    buffer.add({{frame, frame, frame, static_cast<float>(id), 0, id == 16, id == 14}});
  }
  const Rows rows = sampled(buffer, 64);
  const std::size_t steps[] = {3, 2, 1, 2, 1, 3, 2, 1};  // of ids 12..19
  for (std::size_t k = 0; k < 64; ++k) {
    const std::size_t taken = steps[rows.ids[k] - 12];
    float expected = 0.0F;
    float discount = 1.0F;
    for (std::size_t step = 0; step < taken; ++step, discount /= 2.0F) {
      expected += discount * static_cast<float>(rows.ids[k] + static_cast<std::int64_t>(step));
    }
    CHECK(rows.rewards[k] == expected && rows.discounts[k] == discount);
    CHECK(rows.terminals[k] == (rows.ids[k] + static_cast<std::int64_t>(taken) == 17));
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
  rows_are_right_after_wraparound();
  clips_live_as_long_as_they_are_used();
  memory_stays_in_its_bound();
  mistakes_change_nothing();
  steps_stop_where_the_episode_does();
  loading_restores_and_refuses();
  the_arena_grows_around_what_it_holds();
  return 0;
}
