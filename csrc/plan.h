// plan_send, plan_arrival: where rows go, as integers. Linear in T * K, no comparison sort.
//
//   plan_send     ids (T, K) of this rank's tokens -> rows to send, one per token and rank, and each token's
//                 way back
//   plan_arrival  local slots (R, W) of the arrived rows -> the same rows grouped by local slot
//
// A slot is a place for one expert: slot s lives on rank s / slots_per_rank. An index of -1 means "none":
// buffers have the size of the worst case, so that a caller can allocate before the counts are known.
//
// Rows stand in the order (rank, token) with the own rank last, so that all that travels is one contiguous
// run. Arrived rows are a sequence of runs; the rows of one slot stand in the order of the global tokens, the
// same for every number of ranks, because the caller says in which order the runs follow each other.
#pragma once

#include <cstdint>

#include "parallel_for.h"

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

constexpr int kMaxTopK = 32;  // choices of a token are sorted in registers

struct PlanSendArgs {
  const int64_t* expert_ids;      // [num_tokens, top_k], logical ids, distinct within a token, or -1
  const int32_t* slot_of_expert;  // [num_experts], in [0, num_ranks * slots_per_rank)
  int64_t num_tokens;             // may be 0
  int64_t top_k;                  // in [1, kMaxTopK]
  int64_t num_experts;
  int64_t num_ranks;
  int64_t slots_per_rank;
  int64_t own_rank;
  bool one_row_per_copy;   // a row for each choice instead of one per rank; visits then stand in the order of
                           // expert ids
  int64_t max_visits;      // columns of visit_*: top_k if one_row_per_copy, else min(top_k, num_ranks)
  int64_t row_width;       // columns of row_*: 1 if one_row_per_copy, else min(top_k, slots_per_rank)
  int32_t* rows_per_rank;  // [num_ranks], own rank included
  int32_t* row_token;      // [num_tokens * max_visits], token that a row is of, then -1
  int32_t* row_slot;       // [num_tokens * max_visits, row_width], local slots, ascending, then -1
  int32_t* row_choice;     // likewise: which of all choices, token * top_k + column, each slot is
  int32_t* visit_row;      // [num_tokens, max_visits], rows of a token by ascending rank, then -1
  int32_t* visit_rank;     // [num_tokens, max_visits], the ranks, then -1
  int32_t* scratch;        // [scratch_size(num_tokens, num_ranks)]
};

struct PlanArrivalArgs {
  const int32_t* row_slot;     // [num_rows, row_width], ascending, then -1
  const int32_t* rows_of_run;  // [num_runs], in the order of memory; their sum is at most num_rows
  const int32_t* run_order;    // [num_runs], runs in the order of the global tokens
  int64_t num_rows;            // capacity; may be 0
  int64_t row_width;           // in [1, kMaxTopK]
  int64_t num_runs;
  int64_t num_slots;       // of this rank
  int32_t* rows_per_slot;  // [num_slots]
  int32_t* position;       // [num_rows, row_width], place of a copy among all copies grouped by slot, or -1
  int32_t* copy_row;       // [num_rows * row_width], the row that each place is fed from, then -1
  int32_t* scratch;        // [scratch_size(num_rows, num_slots)]
};

// Rows are counted in chunks, so that chunks can be placed side by side.
constexpr int64_t kPlanChunk = 256;

// int32 elements of scratch memory for `num_items` tokens or rows and `num_buckets` ranks or slots.
constexpr int64_t scratch_size(int64_t num_items, int64_t num_buckets) {
  return (num_items + kPlanChunk - 1) / kPlanChunk * num_buckets + num_buckets;
}

void plan_send_cpu(const PlanSendArgs& args, const ParallelFor& parallel_for);
void plan_arrival_cpu(const PlanArrivalArgs& args, const ParallelFor& parallel_for);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Return the launch status; never print, never exit.
cudaError_t plan_send_cuda(const PlanSendArgs& args, cudaStream_t stream);
cudaError_t plan_arrival_cuda(const PlanArrivalArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
