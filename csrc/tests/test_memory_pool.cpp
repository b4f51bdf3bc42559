// Tests the pool: blocks come back, never two users of one, never much more than was in use, from any thread.
#include <cstring>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "memory_pool.h"

namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

void test_a_block_serves_again() {
  rlv2v::MemoryPool pool;
  rlv2v::Pages first = pool.take(5 * kMiB + 1);
  CHECK(first.bytes() == 6 * kMiB);
  CHECK(pool.used_bytes() == 6 * kMiB && pool.idle_bytes() == 0);
  const void* data = first.data();
  pool.give_back(std::move(first));
  CHECK(pool.used_bytes() == 0 && pool.idle_bytes() == 6 * kMiB);
  rlv2v::Pages larger = pool.take(6 * kMiB + 1);  // too large for it
  CHECK(larger.data() != data);
  rlv2v::Pages small = pool.take(5 * kMiB);  // an eighth and more would lie unused
  CHECK(small.data() != data);
  rlv2v::Pages again = pool.take(6 * kMiB);
  CHECK(again.data() == data || pool.idle_bytes() == 0);
}

void test_idle_blocks_stay_within_half_of_what_was_used() {
  rlv2v::MemoryPool pool;
  for (std::size_t size = 1; size <= 64; ++size) {
    pool.give_back(pool.take(size * kMiB));
    CHECK(pool.idle_bytes() <= 96 * kMiB);
  }
  std::vector<rlv2v::Pages> blocks;
  for (int k = 0; k < 8; ++k) blocks.push_back(pool.take(16 * kMiB));
  CHECK(pool.used_bytes() == 128 * kMiB && pool.idle_bytes() <= 64 * kMiB);
  for (rlv2v::Pages& block : blocks) pool.give_back(std::move(block));
  const std::size_t idle = pool.idle_bytes();
  for (int step = 0; step < 100; ++step) {  // a training step: all of it comes from the idle blocks
    for (rlv2v::Pages& block : blocks) block = pool.take(16 * kMiB);
    CHECK(pool.used_bytes() + pool.idle_bytes() == idle);
    for (rlv2v::Pages& block : blocks) pool.give_back(std::move(block));
  }
}

void test_too_much_is_refused() {
  rlv2v::MemoryPool pool;
  CHECK(throws<std::bad_alloc>([&] { pool.take(~std::size_t{0}); }));
  CHECK(throws<std::bad_alloc>([&] { pool.take(std::size_t{1} << 60); }));
  CHECK(pool.used_bytes() == 0 && pool.idle_bytes() == 0);
}

void test_threads() {
  rlv2v::MemoryPool pool;
  std::vector<std::thread> threads;
  for (int id = 1; id <= 4; ++id) {
    threads.emplace_back([&pool, id] {
      for (int step = 0; step < 300; ++step) {
        rlv2v::Pages block = pool.take((1 + static_cast<std::size_t>(step + id) % 3) * kMiB);
        std::memset(block.data(), id, 4096);
        std::this_thread::yield();
        for (std::size_t k = 0; k < 4096; ++k) CHECK(block.data()[k] == id);
        pool.give_back(std::move(block));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(pool.used_bytes() == 0);
}

}  // namespace

int main() {
  test_a_block_serves_again();
  test_idle_blocks_stay_within_half_of_what_was_used();
  test_too_much_is_refused();
  test_threads();
  return 0;
}
