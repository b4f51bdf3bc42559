#include "tests/emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "tests/formats.h"

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

// The scheduler and the tensor cores are not part of the kernel's memory: ThreadSanitizer must see neither races in
// them nor an order by them.
#define RLV2V_UNSEEN __attribute__((no_sanitize("thread"), noinline))

namespace rlv2v::device {

namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = std::size_t{1} << 17;
constexpr long kMaxPolls = 2'000'000;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// One lane's load from shared memory.
struct Load {
  int offset, bytes;
};

// The fragments of a warp's lanes for one product; two, so a lane may be one product ahead.
struct Fragments {
  std::uint32_t a[kWarp][4], b[kWarp][2];
};
struct Warp {
  Fragments fragments[2];
  int arrived = 0;
};

struct Block {
  std::vector<char> shared;
  int arrived = 0;
  int generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* tsan = nullptr;
  int block = 0, thread = 0;
  bool parked = false;
  int position = 0;  // in the grid's runnable
  long products = 0;
  std::vector<Copy> copies;
  std::vector<Load> loads;
};

// Everything that a switch between fibers touches, in plain arrays.
struct Grid {
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<int> queue;
  Fiber main;
  int threads = 0;
  int* runnable = nullptr;
  int num_runnable = 0;
  int alive = 0;
  int ended = 0;
  long polls = 0;  // since a fiber last got past a barrier
  Fiber* current = nullptr;
  Fiber* all = nullptr;
  std::uint64_t random = 0;
  const std::function<void()>* kernel = nullptr;
};
Grid* grid = nullptr;

RLV2V_UNSEEN void die(const char* what) {
  std::fprintf(stderr, "emulation: block %d thread %d: %s\n", grid->current->block, grid->current->thread, what);
  std::_Exit(1);
}

RLV2V_UNSEEN void switch_to(Fiber* next) {
  Fiber* const from = grid->current;
  if (next == from) return;
  grid->current = next;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next->tsan, 1);  // 1: no order between the two
#endif
  swapcontext(&from->context, &next->context);
}

// Continues any fiber that can run; the current one returns when it is runnable and drawn.
RLV2V_UNSEEN void yield() {
  if (grid->num_runnable == 0) die("all threads wait at a barrier");
  grid->random = grid->random * 6364136223846793005u + 1442695040888963407u;
  const int drawn = static_cast<int>((grid->random >> 33) % static_cast<std::uint64_t>(grid->num_runnable));
  switch_to(grid->all + grid->runnable[drawn]);
}

RLV2V_UNSEEN void take_out(const Fiber& fiber) {
  const int moved = grid->runnable[--grid->num_runnable];
  grid->runnable[fiber.position] = moved;
  grid->all[moved].position = fiber.position;
}

RLV2V_UNSEEN void park() {
  take_out(*grid->current);
  grid->current->parked = true;
  yield();
}

RLV2V_UNSEEN void wake(int first, int count) {
  for (int k = first; k < first + count; ++k) {
    if (!grid->all[k].parked) continue;
    grid->all[k].parked = false;
    grid->all[k].position = grid->num_runnable;
    grid->runnable[grid->num_runnable++] = k;
  }
  grid->polls = 0;
}

RLV2V_UNSEEN Block& own_block() { return grid->blocks.data()[grid->current->block]; }
RLV2V_UNSEEN void wake_block() { wake(grid->current->block * grid->threads, grid->threads); }

// Takes part in the warp's next product as one lane: adds its fragments and waits for those of the others.
RLV2V_UNSEEN Fragments* exchange(const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  Fiber& self = *grid->current;
  const int first = static_cast<int>(grid->current - grid->all) / kWarp * kWarp;
  const int lane = self.thread % kWarp;
  Warp& warp = grid->warps.data()[first / kWarp];
  Fragments* const fragments = &warp.fragments[self.products++ % 2];
  for (int k = 0; k < 4; ++k) fragments->a[lane][k] = a[k];
  fragments->b[lane][0] = b0;
  fragments->b[lane][1] = b1;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    wake(first, kWarp);
  } else {
    park();
  }
  return fragments;
}

RLV2V_UNSEEN std::uint16_t half_of(std::uint32_t word, int half) {
  return static_cast<std::uint16_t>(word >> 16 * half);
}

RLV2V_UNSEEN std::uint16_t a_at(const Fragments& fragments, int row, int k) {
  return half_of(fragments.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2);
}
RLV2V_UNSEEN std::uint16_t b_at(const Fragments& fragments, int k, int column) {
  return half_of(fragments.b[column * 4 + k % 8 / 2][k / 8], k % 2);
}

RLV2V_UNSEEN void finish() {
  take_out(*grid->current);
  grid->polls = 0;
  if (--grid->alive == 0) switch_to(&grid->main);
  yield();
}

void enter() {
  (*grid->kernel)();
  if (!grid->current->copies.empty()) die("ends with copies that were never waited for");
  __atomic_add_fetch(&grid->ended, 1, __ATOMIC_RELEASE);
  finish();
}

void prepare(Fiber& fiber) {
  fiber.stack = std::unique_ptr<char[]>(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &enter, 0);
#if defined(__SANITIZE_THREAD__)
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

}  // namespace

// Values of all 65536 numbers of a format.
static std::vector<float> decoded(Format format) {
  std::vector<float> values(65536);
  for (std::uint32_t bits = 0; bits < 65536; ++bits) values[bits] = static_cast<float>(format.decode(bits));
  return values;
}
static const std::vector<float> halves = decoded(kFloat16), bfloats = decoded(kBfloat16);

float Half::to_float(std::uint16_t bits) { return halves[bits]; }
float Bfloat::to_float(std::uint16_t bits) { return bfloats[bits]; }
std::uint16_t Half::from_float(float value) { return static_cast<std::uint16_t>(kFloat16.encode(value)); }
std::uint16_t Bfloat::from_float(float value) { return static_cast<std::uint16_t>(kBfloat16.encode(value)); }

RLV2V_UNSEEN int thread() { return grid->current->thread; }
RLV2V_UNSEEN int block() { return grid->current->block; }
RLV2V_UNSEEN char* shared() { return own_block().shared.data(); }

RLV2V_UNSEEN void note_load(const void* from, std::size_t bytes) {
  const std::ptrdiff_t offset = static_cast<const char*>(from) - shared();
  if (bytes < 8 || offset < 0 || offset >= static_cast<std::ptrdiff_t>(own_block().shared.size())) return;
  grid->current->loads.push_back({static_cast<int>(offset), static_cast<int>(bytes)});
}

void check_aligned(const void* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) die("an address is not aligned");
}

void sync_threads() {
  Block& own = own_block();
  // A chain of read-modify-writes orders what each thread did until it arrived before all that follows the last.
  if (__atomic_add_fetch(&own.arrived, 1, __ATOMIC_ACQ_REL) == grid->threads) {
    __atomic_store_n(&own.arrived, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&own.generation, 1, __ATOMIC_RELEASE);
    wake_block();
    yield();
  } else {
    park();
    __atomic_load_n(&own.generation, __ATOMIC_ACQUIRE);
  }
}

// 8 bytes, or as many of one value when there is no `from`. GCC does not show ThreadSanitizer a constant memset or
// memcpy of 16 bytes.
static void move_half(void* to, const void* from, int value) {
  std::uint64_t bytes = 0x0101010101010101u * static_cast<std::uint64_t>(value);
  if (from != nullptr) std::memcpy(&bytes, from, sizeof bytes);
  std::memcpy(to, &bytes, sizeof bytes);
}

void copy_async(void* to, const void* from, bool valid) {
  check_aligned(to, 16);
  check_aligned(from, 16);
  move_half(to, nullptr, 0xff);
  move_half(static_cast<char*>(to) + 8, nullptr, 0xff);
  Fiber& self = *grid->current;
  self.copies.push_back({to, from, valid});
}

void copy_wait() {
  Fiber& self = *grid->current;
  for (const Copy& copy : self.copies) {
    for (std::size_t k = 0; k < 16; k += 8) {
      move_half(static_cast<char*>(copy.to) + k, copy.valid ? static_cast<const char*>(copy.from) + k : nullptr, 0);
    }
  }
  self.copies.clear();
}

void arrive(std::uint32_t* counter) { __atomic_add_fetch(counter, 1, __ATOMIC_RELEASE); }

RLV2V_UNSEEN static void poll() {
  if (++grid->polls > kMaxPolls) die("waits for other blocks for ever");
  yield();
}

void wait_for(const std::uint32_t* counter, std::uint32_t count) {
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < count) poll();
}

RLV2V_UNSEEN void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                               float (*to_float)(std::uint16_t)) {
  const Fragments& fragments = *exchange(a, b0, b1);
  const int lane = grid->current->thread % kWarp;
  for (int e = 0; e < 4; ++e) {
    for (int k = 0; k < 16; ++k) {
      d[e] += to_float(a_at(fragments, lane / 4 + e / 2 * 8, k)) * to_float(b_at(fragments, k, lane % 4 * 2 + e % 2));
    }
  }
}

// The lanes of a warp load together; 128 bytes go at once, from 32 banks of 4 bytes: 16 lanes of 8 bytes, 8 of 16.
static int count_conflicts(const std::vector<Fiber>& fibers) {
  int conflicts = 0;
  for (std::size_t first = 0; first < fibers.size(); first += kWarp) {
    for (std::size_t k = 0; k < fibers[first].loads.size(); ++k) {
      const int bytes = fibers[first].loads[k].bytes;
      for (std::size_t start = first; start < first + kWarp; start += static_cast<std::size_t>(128 / bytes)) {
        std::vector<int> in_bank(32, -1);
        bool conflict = false;
        for (std::size_t lane = start; lane < start + static_cast<std::size_t>(128 / bytes); ++lane) {
          for (int word = fibers[lane].loads[k].offset / 4; word < (fibers[lane].loads[k].offset + bytes) / 4; ++word) {
            int& held = in_bank[static_cast<std::size_t>(word % 32)];
            conflict = conflict || (held >= 0 && held != word);
            held = word;
          }
        }
        conflicts += conflict;
      }
    }
  }
  return conflicts;
}

int run_grid(int blocks, int threads, int shared_bytes, std::uint64_t seed, const std::function<void()>& kernel) {
  Grid own;
  grid = &own;
  const auto total = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(threads);
  own.threads = threads;
  own.kernel = &kernel;
  own.random = seed;
  own.blocks.resize(static_cast<std::size_t>(blocks));
  for (Block& block : own.blocks) block.shared.assign(static_cast<std::size_t>(shared_bytes), '\xff');
  own.warps.resize(total / kWarp);
  own.fibers.resize(total);
  own.queue.resize(total);
  own.runnable = own.queue.data();
  own.all = own.fibers.data();
  own.num_runnable = own.alive = static_cast<int>(total);
  own.current = &own.main;
  for (std::size_t k = 0; k < total; ++k) {
    Fiber& fiber = own.fibers[k];
    own.runnable[k] = fiber.position = static_cast<int>(k);
    fiber.block = static_cast<int>(k) / threads;
    fiber.thread = static_cast<int>(k) % threads;
    prepare(fiber);
  }
#if defined(__SANITIZE_THREAD__)
  own.main.tsan = __tsan_get_current_fiber();
#endif
  yield();
  __atomic_load_n(&own.ended, __ATOMIC_ACQUIRE);
#if defined(__SANITIZE_THREAD__)
  for (Fiber& fiber : own.fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
  grid = nullptr;
  return count_conflicts(own.fibers);
}

}  // namespace rlv2v::device
