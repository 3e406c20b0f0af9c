#include "plan.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "vectorise.h"

namespace ep {
namespace {

// A choice as one number, so that a token's choices sort as integers: its place, then its column.
constexpr int kColumnBits = 5;
static_assert(kMaxTopK == 1 << kColumnBits);
constexpr uint32_t kColumnMask = kMaxTopK - 1;
constexpr uint32_t kNoPlace = ~0u >> kColumnBits;  // after all others

// Sorts kSize different numbers by counting how many are below each: no branch to mispredict.
template <int kSize>
void sort_numbers(const uint32_t* given, uint32_t* sorted) {
  for (int i = 0; i < kSize; ++i) {
    int below = 0;
    for (int j = 0; j < kSize; ++j) below += given[j] < given[i];
    sorted[below] = given[i];
  }
}

void sort_numbers(const uint32_t* given, uint32_t* sorted, int64_t size) {
  switch (size) {
    case 2:
      return sort_numbers<2>(given, sorted);
    case 4:
      return sort_numbers<4>(given, sorted);
    case 6:
      return sort_numbers<6>(given, sorted);
    case 8:
      return sort_numbers<8>(given, sorted);
    default:
      std::copy_n(given, size, sorted);
      std::sort(sorted, sorted + size);
  }
}

// A token's choices in the order in which its rows name them: by slot, or by expert where each has a row.
class Choices {
 public:
  explicit Choices(const PlanSendArgs& args)
      : args_(args),
        place_(args.num_experts),
        slots_(std::max(args.num_experts, args.num_ranks * args.slots_per_rank)) {
    const auto slots_per_rank = static_cast<int32_t>(args.slots_per_rank);
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const int32_t slot = args.slot_of_expert[e];
      place_[e] = args.one_row_per_copy ? static_cast<int32_t>(e) : slot;
      slots_[place_[e]] = {slot / slots_per_rank, slot % slots_per_rank};
    }
  }

  void load(int64_t token) {
    const int64_t* ids = args_.expert_ids + token * args_.top_k;
    uint32_t given[kMaxTopK], sorted[kMaxTopK];
    int count = 0;
    for (int64_t k = 0; k < args_.top_k; ++k) {
      count += ids[k] >= 0;
      const uint32_t place = ids[k] < 0 ? kNoPlace : static_cast<uint32_t>(place_[ids[k]]);
      given[k] = place << kColumnBits | static_cast<uint32_t>(k);
    }
    sort_numbers(given, sorted, args_.top_k);
    const auto first_choice = static_cast<int32_t>(token * args_.top_k);
    uint32_t starts = 0;
    for (int i = 0; i < count; ++i) {
      const Slot slot = slots_[sorted[i] >> kColumnBits];
      const bool is_start = args_.one_row_per_copy || i == 0 || slot.rank != ranks[i - 1];
      starts |= static_cast<uint32_t>(is_start) << i;
      ranks[i] = slot.rank;
      slots[i] = slot.local;
      choices[i] = first_choice + static_cast<int32_t>(sorted[i] & kColumnMask);
    }
    starts_ = starts;
    count_ = count;
  }

  // Calls visit(first, last) for each row of the token: choices [first, last) share it.
  template <typename Visit>
  void for_each_row(Visit visit) const {
    for (uint32_t starts = starts_; starts != 0;) {
      const int first = std::countr_zero(starts);
      starts &= starts - 1;
      visit(first, starts != 0 ? std::countr_zero(starts) : count_);
    }
  }

  // Of each choice. Longer than a token's, so that as many as a row has may be read from any of them on.
  int32_t ranks[kMaxTopK], slots[2 * kMaxTopK] = {}, choices[2 * kMaxTopK] = {};

 private:
  struct Slot {
    int32_t rank, local;
  };

  const PlanSendArgs& args_;
  std::vector<int32_t> place_;  // [num_experts], what choices are sorted by
  std::vector<Slot> slots_;     // of each place
  uint32_t starts_;             // bit i: choice i begins a row
  int count_;
};

int64_t num_chunks(int64_t num_items) { return (num_items + kPlanChunk - 1) / kPlanChunk; }

// Turns counts[chunk, bucket] into the places where each chunk's items of a bucket begin, buckets one after
// the other in the order that `bucket_at` gives; totals[bucket] becomes the items of a bucket. Counts are
// gone through as they lie in memory.
template <typename BucketAt>
int32_t place_chunks(
    int32_t* counts, int64_t chunks, int64_t num_buckets, int32_t* totals, BucketAt bucket_at) {
  std::fill_n(totals, num_buckets, 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int32_t* __restrict row = counts + chunk * num_buckets;
    for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
      const int32_t count = row[bucket];
      row[bucket] = totals[bucket];
      totals[bucket] += count;
    }
  }
  std::vector<int32_t> begin(num_buckets);
  int32_t end = 0;
  for (int64_t i = 0; i < num_buckets; ++i) {
    begin[bucket_at(i)] = end;
    end += totals[bucket_at(i)];
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int32_t* row = counts + chunk * num_buckets;
    for (int64_t bucket = 0; bucket < num_buckets; ++bucket) row[bucket] += begin[bucket];
  }
  return end;
}

void count_rows(const PlanSendArgs& args, int64_t begin_chunk, int64_t end_chunk) {
  std::vector<int32_t> rank_of(args.num_experts);
  for (int64_t e = 0; e < args.num_experts; ++e) {
    rank_of[e] = args.slot_of_expert[e] / static_cast<int32_t>(args.slots_per_rank);
  }
  const bool fit_in_word = !args.one_row_per_copy && args.num_ranks <= 64;  // a token's ranks
  std::vector<int64_t> last_token(args.num_ranks, -1);  // that has a row for the rank already
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    int32_t* counts = args.scratch + chunk * args.num_ranks;
    std::fill_n(counts, args.num_ranks, 0);
    const int64_t end = std::min(args.num_tokens, (chunk + 1) * kPlanChunk);
    for (int64_t token = chunk * kPlanChunk; token < end; ++token) {
      const int64_t* ids = args.expert_ids + token * args.top_k;
      if (fit_in_word) {  // else each choice would wait for what the one before it has written
        uint64_t ranks = 0;
        for (int64_t k = 0; k < args.top_k; ++k) ranks |= ids[k] < 0 ? 0 : uint64_t{1} << rank_of[ids[k]];
        for (; ranks != 0; ranks &= ranks - 1) ++counts[std::countr_zero(ranks)];
        continue;
      }
      for (int64_t k = 0; k < args.top_k; ++k) {
        if (ids[k] < 0) continue;
        const int32_t rank = rank_of[ids[k]];
        counts[rank] += args.one_row_per_copy || last_token[rank] != token;
        last_token[rank] = token;
      }
    }
  }
}

EP_VECTORISED void place_rows(const PlanSendArgs& args, int64_t begin_chunk, int64_t end_chunk) {
  Choices choices(args);
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    int32_t* next_row = args.scratch + chunk * args.num_ranks;
    const int64_t end = std::min(args.num_tokens, (chunk + 1) * kPlanChunk);
    for (int64_t token = chunk * kPlanChunk; token < end; ++token) {
      choices.load(token);
      int64_t visit = token * args.max_visits;
      choices.for_each_row([&](int64_t first, int64_t last) {
        const int32_t rank = choices.ranks[first], row = next_row[rank]++;
        args.row_token[row] = static_cast<int32_t>(token);
        int32_t* __restrict slots = args.row_slot + row * args.row_width;
        int32_t* __restrict columns = args.row_choice + row * args.row_width;
        for (int64_t i = 0; i < args.row_width; ++i) {
          slots[i] = first + i < last ? choices.slots[first + i] : -1;
          columns[i] = first + i < last ? choices.choices[first + i] : -1;
        }
        args.visit_row[visit] = row;
        args.visit_rank[visit] = rank;
        ++visit;
      });
      const int64_t unused = (token + 1) * args.max_visits - visit;
      std::fill_n(args.visit_row + visit, unused, -1);
      std::fill_n(args.visit_rank + visit, unused, -1);
    }
  }
}

// Where run i of the order begins in the order of tokens and in memory.
struct Run {
  int64_t begin;
  int64_t memory;
};

class Runs {
 public:
  explicit Runs(const PlanArrivalArgs& args) : runs_(args.num_runs) {
    std::vector<int64_t> memory(args.num_runs);
    for (int64_t run = 1; run < args.num_runs; ++run)
      memory[run] = memory[run - 1] + args.rows_of_run[run - 1];
    for (int64_t i = 0; i < args.num_runs; ++i) {
      runs_[i] = {total_, memory[args.run_order[i]]};
      total_ += args.rows_of_run[args.run_order[i]];
    }
  }

  int64_t total() const { return total_; }

  // Calls visit(row) for the arrived rows [begin, end) of the order of tokens.
  template <typename Visit>
  void for_each_row(int64_t begin, int64_t end, Visit visit) const {
    for (size_t i = 0; i < runs_.size(); ++i) {
      const int64_t run_end = i + 1 < runs_.size() ? runs_[i + 1].begin : total_;
      const int64_t shift = runs_[i].memory - runs_[i].begin;
      for (int64_t t = std::max(begin, runs_[i].begin); t < std::min(end, run_end); ++t) visit(t + shift);
    }
  }

 private:
  std::vector<Run> runs_;
  int64_t total_ = 0;
};

void count_copies(const PlanArrivalArgs& args, const Runs& runs, int64_t begin_chunk, int64_t end_chunk) {
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    int32_t* counts = args.scratch + chunk * args.num_slots;
    std::fill_n(counts, args.num_slots, 0);
    runs.for_each_row(chunk * kPlanChunk, (chunk + 1) * kPlanChunk, [&](int64_t row) {
      const int32_t* slots = args.row_slot + row * args.row_width;
      for (int64_t c = 0; c < args.row_width && slots[c] >= 0; ++c) ++counts[slots[c]];
    });
  }
}

constexpr int64_t kLine = 64 / sizeof(int32_t);  // numbers in a cache line

// Copies go to one place per slot in turn, too many for the processor to foresee the lines that are next.
void place_copies(const PlanArrivalArgs& args, const Runs& runs, int64_t begin_chunk, int64_t end_chunk) {
  const int32_t* first = args.scratch + begin_chunk * args.num_slots;
  for (int64_t slot = 0; slot < args.num_slots; ++slot) __builtin_prefetch(args.copy_row + first[slot], 1);
  for (int64_t chunk = begin_chunk; chunk < end_chunk; ++chunk) {
    int32_t* next = args.scratch + chunk * args.num_slots;
    runs.for_each_row(chunk * kPlanChunk, (chunk + 1) * kPlanChunk, [&](int64_t row) {
      const int32_t* slots = args.row_slot + row * args.row_width;
      int32_t* positions = args.position + row * args.row_width;
      int64_t c = 0;
      for (; c < args.row_width && slots[c] >= 0; ++c) {
        const int32_t place = next[slots[c]]++;
        positions[c] = place;
        args.copy_row[place] = static_cast<int32_t>(row);
        __builtin_prefetch(args.copy_row + place + kLine, 1);
      }
      std::fill_n(positions + c, args.row_width - c, -1);
    });
  }
}

}  // namespace

void plan_send_cpu(const PlanSendArgs& args, const ParallelFor& parallel_for) {
  const int64_t chunks = num_chunks(args.num_tokens);
  parallel_for(chunks, [&](int64_t begin, int64_t end) { count_rows(args, begin, end); });
  const int64_t num_rows =
      place_chunks(args.scratch, chunks, args.num_ranks, args.rows_per_rank, [&](int64_t i) {
        return i == args.num_ranks - 1 ? args.own_rank : i + (i >= args.own_rank);
      });
  parallel_for(chunks, [&](int64_t begin, int64_t end) { place_rows(args, begin, end); });

  const int64_t unused = args.num_tokens * args.max_visits - num_rows;
  std::fill_n(args.row_token + num_rows, unused, -1);
  std::fill_n(args.row_slot + num_rows * args.row_width, unused * args.row_width, -1);
  std::fill_n(args.row_choice + num_rows * args.row_width, unused * args.row_width, -1);
}

void plan_arrival_cpu(const PlanArrivalArgs& args, const ParallelFor& parallel_for) {
  const Runs runs(args);
  const int64_t chunks = num_chunks(runs.total());
  parallel_for(chunks, [&](int64_t begin, int64_t end) { count_copies(args, runs, begin, end); });
  const int64_t num_copies = place_chunks(
      args.scratch, chunks, args.num_slots, args.rows_per_slot, [](int64_t slot) { return slot; });
  parallel_for(chunks, [&](int64_t begin, int64_t end) { place_copies(args, runs, begin, end); });

  const int64_t unused = args.num_rows * args.row_width - num_copies;
  std::fill_n(args.copy_row + num_copies, unused, -1);
  std::fill_n(
      args.position + runs.total() * args.row_width, (args.num_rows - runs.total()) * args.row_width, -1);
}

}  // namespace ep
