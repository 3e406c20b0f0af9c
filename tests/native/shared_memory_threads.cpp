// The shared-memory protocol with ranks as threads, for ThreadSanitizer: every byte that a rank reads was
// written by another, without a lock, so an order that the protocol does not give is a race that the
// sanitizer sees.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "shared_memory.h"

namespace {

constexpr int kRanks = 4, kExchanges = 300, kMaxBytes = 4096;

struct Arena {
  ep::SharedControl control{};
  std::vector<unsigned char> bytes = std::vector<unsigned char>(kRanks * kMaxBytes);
};

int64_t bytes_between(int from, int to, int turn) { return (from * 7 + to * 13 + turn * 29) % kMaxBytes; }

unsigned char content(int from, int to, int turn, int64_t i) {
  return static_cast<unsigned char>(from * 31 + to * 17 + turn * 5 + i);
}

void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void run_rank(const std::vector<std::unique_ptr<Arena>>& arenas, int rank) {
  std::vector<ep::SharedControl*> controls;
  for (const auto& arena : arenas) controls.push_back(&arena->control);
  const std::vector<int32_t> process(kRanks, -1);
  const ep::Sharers sharers{controls.data(), process.data(), kRanks, rank, 60.0};
  uint32_t number = 0xffffff00u;  // the numbers start again on the way

  for (int turn = 0; turn < kExchanges; ++turn) {
    int32_t counts[kRanks], arrived[kRanks];
    for (int p = 0; p < kRanks; ++p) counts[p] = static_cast<int32_t>(bytes_between(rank, p, turn));
    check(ep::shared_counts(sharers, ++number, counts, 1, arrived).status == ep::SharedStatus::kDone,
          "counts");
    int64_t place[kRanks], expected[kRanks], sending[kRanks], destination[kRanks];
    for (int p = 0; p < kRanks; ++p) {
      check(arrived[p] == bytes_between(p, rank, turn), "a count is wrong");
      place[p] = p * kMaxBytes;
      expected[p] = arrived[p];
      sending[p] = counts[p];
    }
    check(ep::shared_open(sharers, ++number, place, expected, sending, destination).status ==
              ep::SharedStatus::kDone,
          "open");
    for (int p = 0; p < kRanks; ++p) {
      for (int64_t i = 0; i < sending[p]; ++i) {
        arenas[p]->bytes[destination[p] + i] = content(rank, p, turn, i);
      }
    }
    check(ep::shared_close(sharers, number).status == ep::SharedStatus::kDone, "close");
    for (int p = 0; p < kRanks; ++p) {
      for (int64_t i = 0; i < expected[p]; ++i) {
        check(arenas[rank]->bytes[place[p] + i] == content(p, rank, turn, i), "a byte is wrong");
      }
    }
  }
}

}  // namespace

int main() {
  std::vector<std::unique_ptr<Arena>> arenas;
  for (int rank = 0; rank < kRanks; ++rank) {
    arenas.push_back(std::make_unique<Arena>());
    // As if they had been at it for long, so that the numbers pass 2^32.
    arenas.back()->control.opened.number = 0xffffff00u;
    for (auto& closed : arenas.back()->control.closed) closed.number = 0xffffff00u;
  }
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < kRanks; ++rank) ranks.emplace_back([&arenas, rank] { run_rank(arenas, rank); });
  for (std::thread& rank : ranks) rank.join();
  std::puts("every byte arrived");
  return 0;
}
