// shared_memory: how ranks of one machine tell each other where to write, and that it is written.
//
// Every rank has an arena that all ranks map. An exchange has a number, the same on all ranks:
//   open   says where in the own arena each rank's bytes go and how many are expected, waits until all others
//          have said so, and compares what they expect with what will be sent;
//   (the caller writes into the others' arenas)
//   close  tells the others that all is written, and waits until all of them have said so.
// `exchange_counts` is an exchange by itself, of a few integers through the control blocks.
//
// A wait ends when its word arrives, when the peer has died or has said that it failed, or after the
// time-out; it spins for a moment and then sleeps in the kernel. Words are written with release and read with
// acquire, behind a fence for streaming stores. A control block holds for exchange s what its owner wrote for
// s until all peers have closed s, so one copy is enough; counts are written by the peers and so alternate
// between two.
#pragma once

#include <atomic>
#include <cstdint>

namespace ep {

constexpr int kMaxSharers = 64;     // ranks of one machine
constexpr int kMaxSharedRuns = 64;  // counts for one rank

// A word that others wait for, in a cache line of its own.
struct alignas(64) Signal {
  std::atomic<uint32_t> number;
};

// The first bytes of an arena; zero at the beginning.
struct SharedControl {
  uint64_t token;              // tells that a mapping is the arena it should be
  Signal opened;               // number of the last exchange the owner opened
  Signal closed[kMaxSharers];  // number of the last exchange that a rank closed, as told to the owner
  std::atomic<uint32_t> failed[kMaxSharers];  // a rank gave up, as told to the owner
  int64_t place[kMaxSharers];                 // where in the arena a rank's bytes go
  int64_t expected[kMaxSharers];              // how many bytes
  int32_t counts[2][kMaxSharers][kMaxSharedRuns];
};

constexpr int64_t kSharedControlBytes = sizeof(SharedControl);
static_assert(kSharedControlBytes <= 1 << 16, "SHARED_CONTROL_BYTES of ops.py");

enum class SharedStatus { kDone, kTimeOut, kDied, kFailed, kDisagrees };

// What ended an exchange early, and whose fault it was.
struct SharedResult {
  SharedStatus status = SharedStatus::kDone;
  int peer = -1;
};

struct Sharers {
  SharedControl* const* controls;  // [num_ranks], as mapped here
  const int32_t* process;          // [num_ranks], a pidfd to ask whether the rank lives, or -1
  int num_ranks;                   // at most kMaxSharers
  int rank;                        // of this process
  double timeout_s;
};

// `place` and `expected` are [num_ranks], for the bytes of each rank; `sending` is what this rank will send
// to each. Leaves in `destination` where in each rank's arena this rank's bytes go.
SharedResult shared_open(const Sharers& sharers,
                         uint32_t number,
                         const int64_t* place,
                         const int64_t* expected,
                         const int64_t* sending,
                         int64_t* destination);

SharedResult shared_close(const Sharers& sharers, uint32_t number);

// Sends row p of `counts`, [num_ranks, num_runs], to rank p; `received` has the same shape.
SharedResult shared_counts(
    const Sharers& sharers, uint32_t number, const int32_t* counts, int num_runs, int32_t* received);

// Tells all others that this rank gives up.
void shared_fail(const Sharers& sharers);

}  // namespace ep
