// Memory for n sampled rows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "replay/buffer.h"

struct Rows {
  Rows(std::size_t n, std::size_t len, std::size_t bytes)
      : states(n * len * bytes), actions(n * bytes), next_states(n * (len + 1) * bytes), true_frames(n * bytes),
        lengths(n), next_lengths(n), positions(n), ids(n), rewards(n), discounts(n), weights(n),
        terminals(new bool[n]) {}
  rlv2v::SampleOut out() {
    return {states.data(),       lengths.data(),   actions.data(),     rewards.data(),
            next_states.data(),  next_lengths.data(), discounts.data(), true_frames.data(),
            positions.data(),    terminals.get(),  ids.data(),         weights.data()};
  }
  std::vector<std::uint8_t> states, actions, next_states, true_frames;
  std::vector<std::int64_t> lengths, next_lengths, positions, ids;
  std::vector<float> rewards, discounts, weights;
  std::unique_ptr<bool[]> terminals;
};
