// Two threads sample and update priorities while one adds: no leak, and nothing for TSan to report. Torn rows are looked
// for from Python.
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"
#include "replay/buffer.h"
#include "rows.h"

namespace {

constexpr std::size_t kBytes = 64;
constexpr std::size_t kLen = 4;
constexpr std::size_t kRows = 8;
constexpr int kAdds = 3000;

void add(rlv2v::Buffer& buffer, int step) {
  const auto value = static_cast<std::uint8_t>(step % 255 + 1);
  const std::vector<std::uint8_t> frames(kLen * kBytes, value);
  const rlv2v::ClipId clip = buffer.put_clip(frames.data(), kLen);
  buffer.add({{{clip, 0, kLen, nullptr}, {rlv2v::kNoClip, 0, 1, frames.data()}, {clip, 1, 1, nullptr},
               static_cast<float>(value), value, false, false}});
  buffer.release_clip(clip);
}

void sample(rlv2v::Buffer& buffer, std::vector<std::int64_t>& ids) {
  Rows rows(kRows, kLen, kBytes);
  buffer.sample(kRows, rows.out());
  ids = rows.ids;
}

}  // namespace

int main() {
  rlv2v::Buffer buffer({32, kBytes, kLen, rlv2v::kMaxFrames, 0.6, 0.4, true, 0, 1, 0.99, ""});
  add(buffer, 0);
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    for (int step = 1; step < kAdds; ++step) add(buffer, step);
    done = true;
  });
  for (int k = 0; k < 2; ++k) {
    threads.emplace_back([&, k] {
      std::vector<std::int64_t> ids(kRows);
      const std::vector<double> priorities(kRows, 0.5 + k);
      for (int round = 0; round < 500 || !done; ++round) {
        sample(buffer, ids);
        buffer.update_priorities(ids.data(), priorities.data(), kRows);
        CHECK(buffer.stats().size <= 32);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(buffer.consistent());
  CHECK(buffer.stats().frames == 32 * (kLen + 1));
  return 0;
}
