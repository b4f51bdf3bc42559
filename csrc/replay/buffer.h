// Prioritised replay of video transitions (state, action, reward, next state, true frame, position, terminal, end).
//
//   P(i) = p_i^alpha / sum_j p_j^alpha;   weight_i = (N P(i))^-beta / max_j (N P(j))^-beta = (min_j p_j / p_i)^(alpha
//   beta)
// Source: Schaul et al. 2016, arXiv:1511.05952, eq. 1 and section 3.4, algorithm 1: a new transition gets the largest
// priority so far, at first 1. A transition holds references to frames, so overlapping states share their memory.
// Ids count up from 0 and live in slot id % capacity; those stored are always oldest_id <= id < next_id.
//
//   n steps: r = sum_{k<m} gamma^k r_{i+k}, s' and terminal of transition i+m-1, discount gamma^m
// Source: Sutton 1988, doi:10.1007/BF00115009. m <= n, less if a terminal, an episode's end or the newest id comes
// first. Every public method locks: samplers share, writers exclude. In a forked child it throws std::runtime_error. A
// user's mistake throws std::invalid_argument or std::out_of_range, a full memory or disk std::bad_alloc or
// std::system_error, with nothing changed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "pages.h"
#include "replay/fair_lock.h"
#include "replay/fork_guard.h"
#include "replay/frame_arena.h"
#include "replay/sum_tree.h"

namespace rlv2v {

using ClipId = std::uint64_t;
constexpr ClipId kNoClip = 0;

struct BufferConfig {
  std::size_t capacity;     // most transitions
  std::size_t frame_bytes;  // bytes of one frame
  std::size_t max_len;      // most frames of a state
  std::size_t max_frames;   // most frames, clips included
  double alpha;             // in [0, 1]; 0 draws uniformly
  double beta;              // in [0, 1]; 1 corrects the bias fully
  bool stratified;          // one draw from each of n equal parts of the total
  std::uint64_t seed;
  std::size_t n_step;  // at least 1
  double gamma;        // in [0, 1]
  std::string path;    // scratch file for the frames; empty: memory
};

// `length` frames: frames `start`... of a clip in the buffer, or with kNoClip the bytes at `frames`.
struct Window {
  ClipId clip;
  std::size_t start;
  std::size_t length;
  const std::uint8_t* frames;
};

struct Transition {
  Window state;
  Window action;      // of length 1
  Window true_frame;  // of length 1
  float reward;
  std::int64_t position;
  bool terminal;  // the episode is over: nothing to bootstrap from
  bool end;       // the next transition belongs to another episode
};

// The arrays that sample(n) writes to, each contiguous; F = frame_bytes, L = max_len.
struct SampleOut {
  enum class Row { kNumber, kFrame, kState, kNextState };  // a number, F, (L, F) or (L + 1, F)

  std::uint8_t* states;        // zero after the state's length
  std::int64_t* lengths;
  std::uint8_t* actions;
  float* rewards;              // sums over n steps
  std::uint8_t* next_states;   // the last step's state, then its action, then zeros
  std::int64_t* next_lengths;
  float* discounts;            // gamma^m
  std::uint8_t* true_frames;
  std::int64_t* positions;
  bool* terminals;             // of the last step
  std::int64_t* ids;
  float* weights;              // in (0, 1]

  // Calls f(name, pointer, row) for each array; the names are those of rlv2v.replay.ReplayBatch.
  template <class F>
  void for_each(const F& f) {
    f("states", states, Row::kState);
    f("lengths", lengths, Row::kNumber);
    f("actions", actions, Row::kFrame);
    f("rewards", rewards, Row::kNumber);
    f("next_states", next_states, Row::kNextState);
    f("next_lengths", next_lengths, Row::kNumber);
    f("discounts", discounts, Row::kNumber);
    f("true_frames", true_frames, Row::kFrame);
    f("positions", positions, Row::kNumber);
    f("terminals", terminals, Row::kNumber);
    f("ids", ids, Row::kNumber);
    f("weights", weights, Row::kNumber);
  }
};

struct BufferStats {
  std::size_t size;       // transitions in the buffer
  std::size_t frames;     // frames in the buffer
  std::size_t clips;      // clips not released
  std::uint64_t added;    // transitions added so far: the next id
  std::uint64_t evicted;  // transitions evicted so far: the oldest id
  std::uint64_t sampled;  // draws so far
  std::uint64_t stale;    // priority updates ignored because the transition was evicted
  float max_priority;
  std::size_t bytes_used;
};

// Everything that a saved buffer holds, oldest transition first; see Buffer::save.
struct Contents {
  PageArray<std::uint8_t> frames;  // (num_frames, F)
  PageArray<std::int32_t> table;   // (size, L + 2) into frames: action, true frame, state; -1 after its length
  PageArray<std::int64_t> lengths, positions;
  PageArray<float> rewards, priorities;        // priorities before alpha
  PageArray<std::uint8_t> terminals, ends;     // 0 or 1
  std::uint64_t oldest_id = 0, sampled = 0, stale = 0, seed = 0;
  double alpha = 0.0, beta = 0.0;
  float max_priority = 1.0F;
  bool stratified = false;

  // Calls f(name, array) for each column of one number a transition.
  template <class F>
  void for_columns(const F& f) {
    f("lengths", lengths);
    f("rewards", rewards);
    f("positions", positions);
    f("terminals", terminals);
    f("ends", ends);
    f("priorities", priorities);
  }
  // Calls f(name, value) for each number of the complete buffer.
  template <class F>
  void for_numbers(const F& f) {
    f("oldest_id", oldest_id);
    f("sampled", sampled);
    f("stale", stale);
    f("seed", seed);
    f("alpha", alpha);
    f("beta", beta);
    f("max_priority", max_priority);
    f("stratified", stratified);
  }
};

// Throws std::invalid_argument unless value is in [0, 1].
void check_exponent(const char* name, double value);
// leaves[k] = priorities[k]^alpha, 1 for every priority at alpha = 0.
void priorities_to_leaves(const float* priorities, float* leaves, std::size_t count, double alpha) noexcept;

class Buffer {
 public:
  explicit Buffer(const BufferConfig& config);

  // Stores frames once and holds them until release_clip; transitions that refer to them hold theirs after it.
  ClipId put_clip(const std::uint8_t* frames, std::size_t num_frames);
  // Ignores unknown ids: a handle may outlive the contents that a load replaced.
  void release_clip(ClipId clip) noexcept;

  // Adds all or none; returns the first id, the others follow. Evicts the oldest as capacity and memory require.
  std::uint64_t add(const std::vector<Transition>& batch);
  // may_share: if every state in the buffer is full and n_step is 1, leaves out.states and out.actions alone and
  // returns true: they are the first L frames of the next states and the frame after those. Half the memory traffic for
  // video.
  bool sample(std::size_t n, const SampleOut& out, bool may_share = false);
  // Returns how many ids were stale (evicted since), and so ignored. The last of a repeated id counts.
  // Real: float or double.
  template <class Real>
  std::size_t update_priorities(const std::int64_t* ids, const Real* priorities, std::size_t count);

  std::size_t max_len() const noexcept { return config_.max_len; }
  std::size_t frame_bytes() const noexcept { return config_.frame_bytes; }
  double alpha() const;
  double beta() const;
  void set_alpha(double alpha);  // recomputes every leaf: O(size)
  void set_beta(double beta);
  BufferStats stats() const;
  bool consistent() const;  // compares the tree with its rebuild and reference counts with their holders; for tests

  // Clips are not part of the contents, only the frames that transitions refer to.
  Contents save() const;
  // Replaces everything but the clip counter (old handles stay invalid). Checks first: contents may be hostile.
  void load(Contents& contents);

 private:
  // The contents of a slot; the frames' ids follow it: action, true frame, state.
  struct Row {
    std::int64_t position;
    float reward;
    float priority;  // before alpha
    std::uint32_t length : 30;
    std::uint32_t terminal : 1;
    std::uint32_t end : 1;

    static constexpr std::size_t kBytes = 20;  // of the above; the compiler would round it up
    FrameId* frames() noexcept { return reinterpret_cast<FrameId*>(reinterpret_cast<unsigned char*>(this) + kBytes); }
    const FrameId* frames() const noexcept { return const_cast<Row*>(this)->frames(); }
    std::size_t num_frames() const noexcept { return length + std::size_t{2}; }
  };
  // All that a load replaces in one move.
  struct Store {
    explicit Store(const BufferConfig& config);
    Row& row(std::size_t slot) const noexcept { return *reinterpret_cast<Row*>(rows.data() + slot * stride); }

    FrameArena arena;
    SumTree tree;
    std::size_t stride;  // bytes of a row
    Pages rows;          // by slot
    std::unordered_map<ClipId, std::vector<FrameId>> clips;
    std::size_t num_clip_frames = 0;
    std::size_t num_short = 0;  // transitions whose state has less than max_len frames
    std::uint64_t oldest_id = 0;
    std::uint64_t next_id = 0;
    std::uint64_t stale = 0;
    float max_priority = 1.0F;
  };
  struct CopyMode {
    bool streamed;  // past the caches
    bool shared;    // states and actions are inside next_states
  };

  std::size_t slot(std::uint64_t id) const noexcept { return static_cast<std::size_t>(id % config_.capacity); }
  std::size_t next_slot(std::size_t slot) const noexcept { return slot + 1 == config_.capacity ? 0 : slot + 1; }
  std::size_t num_slots() const noexcept;
  void check_window(const Window& window, const char* name, std::size_t max_length) const;
  void check_memory(std::size_t num_new_frames) const;
  void store_frames(const Window& window, FrameId* ids) noexcept;
  void evict_oldest() noexcept;
  void draw(std::size_t n, std::uint64_t first_draw, bool shared, const SampleOut& out) const noexcept;
  const Row& write_numbers(std::size_t k, std::size_t slot, std::uint64_t id, const SampleOut& out) const noexcept;
  void write_frames(std::size_t k, const Row& row, const Row& last, CopyMode mode, const SampleOut& out) const noexcept;
  void check_contents(Contents& contents) const;

  // Returns the lock, after a check that this process owns the buffer.
  FairLock& lock() const {
    guard_.check();
    return lock_;
  }

  ForkGuard guard_;
  mutable FairLock lock_;
  BufferConfig config_;
  Store store_;
  std::atomic<std::uint64_t> sampled_{0};
  ClipId next_clip_ = 1;
};

}  // namespace rlv2v
