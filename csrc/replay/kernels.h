// The buffer's inner loops, once for each instruction set. All sets give the same bits; the CPU decides which runs.
//
// No multiply-add is fused and every sum has one order, so a saved buffer draws the same samples on another machine.
//   scan of 8:  p = s;  p_k += p_{k-1};  p_k += p_{k-2};  p_k += p_{k-4}   (each step from the values before it)
//   scan of 16: the scan of the first 8, then that of the last 8 with the first's total added to each
// Source: Kogge and Stone 1973, doi:10.1109/TC.1973.5009159. A total is its scan's last sum. Rounding can make such a
// scan fall by a unit of the last place where a summand is 0, so searches also ask for a positive summand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rlv2v {

constexpr std::size_t kFanout = 8;      // f64 sums under an inner node of the tree, one cache line
constexpr std::size_t kLeafGroup = 16;  // f32 leaves under the lowest inner level, one cache line

struct Kernels {
  const char* name;

  // out[k] = x[k]^exponent within one ulp, for x[k] 0 or normal, exponent in (0, 1]; 0^exponent = 0, x^1 = x.
  void (*power)(const float* x, float* out, std::size_t count, double exponent);
  // out[k] = (low / leaves[k])^exponent for 0 < low <= leaves[k]: importance weights in (0, 1], 1 where leaf = low.
  void (*importance_weights)(const float* leaves, float* out, std::size_t count, double low, double exponent);
  // out[k] = draw first + k of the generator with this key, in [0, 1); see draws.h.
  void (*uniform)(std::uint64_t key, std::uint64_t first, double* out, std::size_t count);

  // Goes one level down for a batch: node[k] becomes its child that holds point[k], and point[k] what remains in it. A
  // child of weight 0 is never chosen; past the total it is the last positive one. Prefetches the first line of the
  // child's children, which lie below_bytes apart. sums: kFanout a node, on cache lines, not all 0.
  void (*descend)(const double* sums, const void* below, std::size_t below_bytes, std::uint32_t* node, double* point,
                  std::size_t count);
  // The same for groups of leaves: index[k], a group, becomes its leaf that holds point[k], value[k] that leaf.
  void (*select_leaf)(const float* leaves, const double* point, std::uint32_t* index, float* value, std::size_t count);

  // For each of the groups: sums[group] = total of its leaves, min_keys[group] = 2^32 - bits of its smallest positive
  // leaf, 0 if it has none: the highest key belongs to the smallest leaf.
  void (*sum_leaves)(const float* leaves, const std::uint32_t* groups, std::size_t count, double* sums,
                     std::uint32_t* min_keys);
  // For each of the nodes: sums[node] = total of its children below, min_keys[node] = the highest of theirs.
  void (*sum_nodes)(const double* sums_below, const std::uint32_t* min_keys_below, const std::uint32_t* nodes,
                    std::size_t count, double* sums, std::uint32_t* min_keys);

  // Copies bytes past the caches, which a large batch would only sweep clean, to one place or (also_to not null) to
  // two. Other threads see them after fence(). to, also_to and bytes are multiples of 64.
  void (*stream)(std::uint8_t* to, std::uint8_t* also_to, const std::uint8_t* from, std::size_t bytes);
  void (*fence)();
};

// The sets that this CPU can run, the plainest first; the last is used.
const std::vector<const Kernels*>& available_kernels();
inline const Kernels& kernels() {
  static const Kernels& best = *available_kernels().back();
  return best;
}

}  // namespace rlv2v
