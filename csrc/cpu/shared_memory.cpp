#include "shared_memory.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>

#include "vectorise.h"

namespace ep {
namespace {

constexpr auto kAwake = std::chrono::microseconds(200);  // falling asleep and waking up takes about as long
constexpr int kLooks = 32;
constexpr int64_t kSleepNs = 50'000'000;  // between two looks at whether the peer lives

bool reached(const Signal& signal, uint32_t number) {
  // The difference, because numbers start again after 2^32.
  return static_cast<int32_t>(signal.number.load(std::memory_order_acquire) - number) >= 0;
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Sleeps until the word is no longer `seen`, or for kSleepNs.
void sleep_on(Signal& signal, uint32_t seen) {
  const timespec limit{.tv_sec = 0, .tv_nsec = kSleepNs};
  syscall(SYS_futex, &signal.number, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

void announce(Signal& signal, uint32_t number) {
  signal.number.store(number, std::memory_order_release);
  syscall(SYS_futex, &signal.number, FUTEX_WAKE, kMaxSharers, nullptr, nullptr, 0);
}

bool has_died(int32_t process) {
  if (process < 0) return false;
  pollfd ended{.fd = process, .events = POLLIN, .revents = 0};
  return poll(&ended, 1, 0) > 0;
}

SharedResult wait_for(const Sharers& sharers, int peer, Signal& signal, uint32_t number) {
  if (reached(signal, number)) return {};
  // Yielding, because the peer may be waiting for this very core.
  const auto until = std::chrono::steady_clock::now() + kAwake;
  while (std::chrono::steady_clock::now() < until) {
    for (int i = 0; i < kLooks; ++i) {
      if (reached(signal, number)) return {};
      pause();
    }
    sched_yield();
  }
  const auto limit = std::chrono::steady_clock::now() + std::chrono::duration<double>(sharers.timeout_s);
  while (true) {
    const uint32_t seen = signal.number.load(std::memory_order_acquire);
    if (reached(signal, number)) return {};
    // Looked at before the word is read again: what a rank wrote before it ended still counts.
    const bool failed = sharers.controls[sharers.rank]->failed[peer].load(std::memory_order_acquire) != 0;
    const bool died = has_died(sharers.process[peer]);
    const bool late = std::chrono::steady_clock::now() > limit;
    if (reached(signal, number)) return {};
    if (failed) return {SharedStatus::kFailed, peer};
    if (died) return {SharedStatus::kDied, peer};
    if (late) return {SharedStatus::kTimeOut, peer};
    sleep_on(signal, seen);
  }
}

// Calls step(peer) for all other ranks, each rank beginning with its neighbour, until one does not go well.
template <typename Step>
SharedResult for_each_peer(const Sharers& sharers, Step step) {
  for (int i = 1; i < sharers.num_ranks; ++i) {
    const int peer = (sharers.rank + i) % sharers.num_ranks;
    const SharedResult result = step(peer);
    if (result.status != SharedStatus::kDone) return result;
  }
  return {};
}

}  // namespace

SharedResult shared_open(const Sharers& sharers,
                         uint32_t number,
                         const int64_t* place,
                         const int64_t* expected,
                         const int64_t* sending,
                         int64_t* destination) {
  SharedControl& own = *sharers.controls[sharers.rank];
  std::copy_n(place, sharers.num_ranks, own.place);
  std::copy_n(expected, sharers.num_ranks, own.expected);
  announce(own.opened, number);
  destination[sharers.rank] = place[sharers.rank];
  return for_each_peer(sharers, [&](int peer) -> SharedResult {
    SharedControl& control = *sharers.controls[peer];
    const SharedResult result = wait_for(sharers, peer, control.opened, number);
    if (result.status != SharedStatus::kDone) return result;
    if (control.expected[sharers.rank] != sending[peer]) return {SharedStatus::kDisagrees, peer};
    destination[peer] = control.place[sharers.rank];
    return {};
  });
}

SharedResult shared_close(const Sharers& sharers, uint32_t number) {
  finish_stream();
  for_each_peer(sharers, [&](int peer) -> SharedResult {
    announce(sharers.controls[peer]->closed[sharers.rank], number);
    return {};
  });
  return for_each_peer(sharers, [&](int peer) {
    return wait_for(sharers, peer, sharers.controls[sharers.rank]->closed[peer], number);
  });
}

SharedResult shared_counts(
    const Sharers& sharers, uint32_t number, const int32_t* counts, int num_runs, int32_t* received) {
  for_each_peer(sharers, [&](int peer) -> SharedResult {
    std::copy_n(counts + peer * num_runs, num_runs, sharers.controls[peer]->counts[number % 2][sharers.rank]);
    return {};
  });
  const SharedResult result = shared_close(sharers, number);
  if (result.status != SharedStatus::kDone) return result;
  const auto& arrived = sharers.controls[sharers.rank]->counts[number % 2];
  for (int rank = 0; rank < sharers.num_ranks; ++rank) {
    const int32_t* from = rank == sharers.rank ? counts + rank * num_runs : arrived[rank];
    std::copy_n(from, num_runs, received + rank * num_runs);
  }
  return {};
}

void shared_fail(const Sharers& sharers) {
  for_each_peer(sharers, [&](int peer) -> SharedResult {
    sharers.controls[peer]->failed[sharers.rank].store(1, std::memory_order_release);
    return {};
  });
}

}  // namespace ep
