// Items (tokens, or arrived rows in the order of global tokens) go to buckets (ranks, or slots). Chunks of
// kPlanChunk items are placed side by side: each is counted, the counts of the chunks before it are summed,
// its items get their places. Inside a chunk the visitors of a bucket are bits, and the place of one is the
// number of bits below its own: no sort, and the atomics that set bits give the same in any order.
#include <algorithm>
#include <initializer_list>

#include "plan.h"

namespace ep {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 8;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWordBits = 32;
constexpr int64_t kChunkWords = kPlanChunk / kWordBits;
constexpr int64_t kSharedWords = 48 * 1024 / sizeof(uint32_t);  // what a block gets without asking for more

// The items of one chunk that visit the buckets [first, last): a bit for each bucket, plane and item. An item
// that can visit a bucket several times uses another plane each time.
struct ChunkBits {
  uint32_t* words;  // [last - first, num_planes, kChunkWords], in shared memory
  int64_t first;
  int64_t last;
  int64_t num_planes;

  __device__ bool has(int64_t bucket) const { return first <= bucket && bucket < last; }

  __device__ void clear() const {
    const int64_t num_words = (last - first) * num_planes * kChunkWords;
    for (int64_t word = threadIdx.x; word < num_words; word += kPlanChunk) words[word] = 0;
  }

  // Marks a visit of this thread's item.
  __device__ void mark(int64_t bucket, int64_t plane) const {
    if (!has(bucket)) return;
    const int64_t word = ((bucket - first) * num_planes + plane) * kChunkWords + threadIdx.x / kWordBits;
    atomicOr(&words[word], 1u << threadIdx.x % kWordBits);
  }

  // Visits to a bucket by the first `num_items` items.
  __device__ int32_t visits(int64_t bucket, int num_items) const {
    const uint32_t* planes = words + (bucket - first) * num_planes * kChunkWords;
    int32_t sum = 0;
    for (int64_t plane = 0; plane < num_planes; ++plane) {
      for (int word = 0; word * kWordBits < num_items; ++word) {
        const int num_bits = num_items - word * kWordBits;
        const uint32_t mask = num_bits >= kWordBits ? ~0u : (1u << num_bits) - 1;
        sum += __popc(planes[plane * kChunkWords + word] & mask);
      }
    }
    return sum;
  }
};

// Scratch memory, and how many buckets a block can mark at a time.
struct Table {
  int32_t* counts;  // [num_buckets, num_chunks], visits; after the scan those of the chunks before
  int32_t* starts;  // [num_buckets], first place of each bucket
  int64_t num_buckets;
  int64_t num_chunks;
  int64_t num_planes;
  int64_t window;  // buckets that fit shared memory

  __device__ ChunkBits bits(uint32_t* words, int64_t first) const {
    return {words, first, first + window < num_buckets ? first + window : num_buckets, num_planes};
  }

  // The first place in a bucket for this thread's item.
  __device__ int32_t first_place(const ChunkBits& bits, int64_t bucket) const {
    return starts[bucket] + counts[bucket * num_chunks + blockIdx.x] + bits.visits(bucket, threadIdx.x);
  }
};

// One of a token's choices, with what a row tells its rank about it.
struct Choice {
  int32_t slot;    // global
  int32_t choice;  // of all choices
  int64_t expert;
};

// Tokens on their way to ranks.
struct SendItems {
  PlanSendArgs args;

  // The token of an index, or -1 behind the last.
  __device__ int64_t at(int64_t index) const { return index < args.num_tokens ? index : -1; }

  __device__ int64_t rank_of(int32_t slot) const { return slot / static_cast<int32_t>(args.slots_per_rank); }

  __device__ void mark(int64_t token, const ChunkBits& bits) const {
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t expert = args.expert_ids[token * args.top_k + k];
      if (expert >= 0) bits.mark(rank_of(args.slot_of_expert[expert]), args.one_row_per_copy ? k : 0);
    }
  }

  // The number of choices; an id of -1 is none.
  __device__ int64_t sort_choices(int64_t token, Choice* choices) const {
    int64_t count = 0;
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t expert = args.expert_ids[token * args.top_k + k];
      if (expert < 0) continue;
      const auto choice = static_cast<int32_t>(token * args.top_k + k);
      const Choice next{args.slot_of_expert[expert], choice, expert};
      int64_t at = count++;  // insertion: top_k is small
      while (at > 0 && (args.one_row_per_copy ? choices[at - 1].expert > next.expert
                                              : choices[at - 1].slot > next.slot)) {
        choices[at] = choices[at - 1];
        --at;
      }
      choices[at] = next;
    }
    return count;
  }

  __device__ void place(int64_t token, const ChunkBits& bits, const Table& table) const {
    Choice choices[kMaxTopK];
    const int64_t count = sort_choices(token, choices);
    int64_t visit = token * args.max_visits;
    for (int64_t first = 0, last; first < count; first = last, ++visit) {
      const int64_t rank = rank_of(choices[first].slot);
      last = first + 1;
      while (!args.one_row_per_copy && last < count && rank_of(choices[last].slot) == rank) ++last;
      if (!bits.has(rank)) continue;
      int32_t row = table.first_place(bits, rank);
      for (int64_t c = 0; args.one_row_per_copy && c < first; ++c) row += rank_of(choices[c].slot) == rank;
      args.row_token[row] = static_cast<int32_t>(token);
      for (int64_t c = first; c < last; ++c) {
        const int64_t column = row * args.row_width + c - first;
        args.row_slot[column] = choices[c].slot - static_cast<int32_t>(rank * args.slots_per_rank);
        args.row_choice[column] = choices[c].choice;
      }
      args.visit_row[visit] = row;
      args.visit_rank[visit] = static_cast<int32_t>(rank);
    }
  }
};

// Arrived rows on their way to slots. A row names a slot once.
struct ArrivalItems {
  PlanArrivalArgs args;

  // The row of an index in the order of global tokens, or -1 behind the last. There are few runs: a thread
  // walks over them.
  __device__ int64_t at(int64_t index) const {
    for (int64_t i = 0; i < args.num_runs; ++i) {
      const int32_t run = args.run_order[i];
      if (index < args.rows_of_run[run]) return first_row(run) + index;
      index -= args.rows_of_run[run];
    }
    return -1;
  }

  // Where a run begins in memory.
  __device__ int64_t first_row(int32_t run) const {
    int64_t row = 0;
    for (int32_t before = 0; before < run; ++before) row += args.rows_of_run[before];
    return row;
  }

  // Calls visit(column, slot) for each copy of a row.
  template <typename Visit>
  __device__ void for_each_copy(int64_t row, Visit visit) const {
    for (int64_t c = row * args.row_width; c < (row + 1) * args.row_width; ++c) {
      if (args.row_slot[c] < 0) break;
      visit(c, args.row_slot[c]);
    }
  }

  __device__ void mark(int64_t row, const ChunkBits& bits) const {
    for_each_copy(row, [&](int64_t, int32_t slot) { bits.mark(slot, 0); });
  }

  __device__ void place(int64_t row, const ChunkBits& bits, const Table& table) const {
    for_each_copy(row, [&](int64_t column, int32_t slot) {
      if (!bits.has(slot)) return;
      const int32_t position = table.first_place(bits, slot);
      args.position[column] = position;
      args.copy_row[position] = static_cast<int32_t>(row);
    });
  }
};

// Marks the visits of this block's chunk, a thread for each item, and calls use(item, bits) when all are
// marked; item is -1 for threads without one. In several rounds if there are more buckets than fit shared
// memory.
template <typename Items, typename Use>
__device__ void mark_chunk(const Items& items, const Table& table, Use use) {
  extern __shared__ uint32_t words[];
  const int64_t item = items.at(static_cast<int64_t>(blockIdx.x) * kPlanChunk + threadIdx.x);
  for (int64_t first = 0; first < table.num_buckets; first += table.window) {
    const ChunkBits bits = table.bits(words, first);
    bits.clear();
    __syncthreads();
    if (item >= 0) items.mark(item, bits);
    __syncthreads();
    use(item, bits);
    __syncthreads();  // before the next round clears the bits
  }
}

// One block marks the visits of one chunk and then counts the marks, a thread for each bucket.
//
// Block kPlanChunk; grid num_chunks; shared memory for the bits of `window` buckets.
template <typename Items>
__global__ void count_kernel(const Items items, const Table table) {
  mark_chunk(items, table, [&](int64_t, const ChunkBits& bits) {
    for (int64_t bucket = bits.first + threadIdx.x; bucket < bits.last; bucket += kPlanChunk) {
      table.counts[bucket * table.num_chunks + blockIdx.x] = bits.visits(bucket, kPlanChunk);
    }
  });
}

// Sum over the lanes up to the own one, itself included.
__device__ int32_t warp_scan(int32_t value) {
  const int lane = threadIdx.x;
  for (int apart = 1; apart < kWarpSize; apart *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, value, apart);
    if (lane >= apart) value += before;
  }
  return value;
}

// One warp turns the counts of one bucket into those of the chunks before, 32 chunks at a time, and writes
// their sum to `totals`. Lanes talk by shuffles only, hence no synchronisation.
//
// Block (kWarpSize, kWarpsPerBlock); grid ceil(num_buckets / kWarpsPerBlock).
__global__ void scan_chunks_kernel(const Table table, int32_t* totals) {  // totals [num_buckets]
  const int64_t bucket = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (bucket >= table.num_buckets) return;

  int32_t* counts = table.counts + bucket * table.num_chunks;
  int32_t end = 0;
  for (int64_t first = 0; first < table.num_chunks; first += kWarpSize) {
    const int64_t chunk = first + threadIdx.x;
    const int32_t count = chunk < table.num_chunks ? counts[chunk] : 0;
    const int32_t sum = warp_scan(count);
    if (chunk < table.num_chunks) counts[chunk] = end + sum - count;
    end += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
  }
  if (threadIdx.x == 0) totals[bucket] = end;
}

// One warp finds where buckets start, 32 buckets at a time; `last_bucket` (-1: none) stands behind all
// others. Lanes talk by shuffles only, hence no synchronisation.
//
// Block kWarpSize; grid 1.
__global__ void scan_buckets_kernel(const Table table, const int32_t* totals, int64_t last_bucket) {
  int32_t end = 0;
  for (int64_t first = 0; first < table.num_buckets; first += kWarpSize) {
    const int64_t bucket = first + threadIdx.x;
    const bool counted = bucket < table.num_buckets && bucket != last_bucket;
    const int32_t count = counted ? totals[bucket] : 0;
    const int32_t sum = warp_scan(count);
    if (counted) table.starts[bucket] = end + sum - count;
    end += __shfl_sync(kAllLanes, sum, kWarpSize - 1);
  }
  if (threadIdx.x == 0 && last_bucket >= 0) table.starts[last_bucket] = end;
}

// One block marks the visits of one chunk again, and then each thread places its own item.
//
// Block kPlanChunk; grid num_chunks; shared memory for the bits of `window` buckets.
template <typename Items>
__global__ void place_kernel(const Items items, const Table table) {
  mark_chunk(items, table, [&](int64_t item, const ChunkBits& bits) {
    if (item >= 0) items.place(item, bits, table);
  });
}

Table make_table(int32_t* scratch, int64_t num_items, int64_t num_buckets, int64_t num_planes) {
  const int64_t num_chunks = (num_items + kPlanChunk - 1) / kPlanChunk;
  return {.counts = scratch,
          .starts = scratch + num_chunks * num_buckets,
          .num_buckets = num_buckets,
          .num_chunks = num_chunks,
          .num_planes = num_planes,
          .window = std::min(num_buckets, kSharedWords / (num_planes * kChunkWords))};
}

// Gives every item, of at least one, its places; how many items visit each bucket goes to `totals`.
template <typename Items>
cudaError_t place_items(
    const Items& items, const Table& table, int64_t last_bucket, int32_t* totals, cudaStream_t stream) {
  const int64_t shared_bytes = table.window * table.num_planes * kChunkWords * sizeof(uint32_t);
  const auto chunks = static_cast<unsigned>(table.num_chunks);
  const auto bucket_blocks = static_cast<unsigned>((table.num_buckets + kWarpsPerBlock - 1) / kWarpsPerBlock);
  count_kernel<<<chunks, kPlanChunk, shared_bytes, stream>>>(items, table);
  scan_chunks_kernel<<<bucket_blocks, dim3(kWarpSize, kWarpsPerBlock), 0, stream>>>(table, totals);
  scan_buckets_kernel<<<1, kWarpSize, 0, stream>>>(table, totals, last_bucket);
  place_kernel<<<chunks, kPlanChunk, shared_bytes, stream>>>(items, table);
  return cudaGetLastError();
}

cudaError_t fill(int value_byte, int32_t* values, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;  // the pointer may be null
  return cudaMemsetAsync(values, value_byte, static_cast<size_t>(count) * sizeof(int32_t), stream);
}

cudaError_t fill_none(std::initializer_list<int32_t*> matrices, int64_t count, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  for (int32_t* values : matrices) {
    if (status == cudaSuccess) status = fill(0xff, values, count, stream);  // all bits set is -1
  }
  return status;
}

}  // namespace

cudaError_t plan_send_cuda(const PlanSendArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return fill(0, args.rows_per_rank, args.num_ranks, stream);

  const int64_t capacity = args.num_tokens * args.max_visits;
  cudaError_t status = fill_none({args.row_token, args.visit_row, args.visit_rank}, capacity, stream);
  if (status == cudaSuccess) {
    status = fill_none({args.row_slot, args.row_choice}, capacity * args.row_width, stream);
  }
  if (status != cudaSuccess) return status;
  const int64_t num_planes = args.one_row_per_copy ? args.top_k : 1;
  const Table table = make_table(args.scratch, args.num_tokens, args.num_ranks, num_planes);
  return place_items(SendItems{args}, table, args.own_rank, args.rows_per_rank, stream);
}

cudaError_t plan_arrival_cuda(const PlanArrivalArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return fill(0, args.rows_per_slot, args.num_slots, stream);

  const cudaError_t status =
      fill_none({args.position, args.copy_row}, args.num_rows * args.row_width, stream);
  if (status != cudaSuccess || args.num_slots == 0) return status;
  const Table table = make_table(args.scratch, args.num_rows, args.num_slots, 1);
  return place_items(ArrivalItems{args}, table, -1, args.rows_per_slot, stream);
}

}  // namespace ep
