// Torch side of plan_send and plan_arrival: check, call.
#include "plan.h"

#include "tensor.h"

namespace ep {
namespace {

void plan_send(const Tensor& expert_ids,
               const Tensor& slot_of_expert,
               int64_t num_ranks,
               int64_t slots_per_rank,
               int64_t own_rank,
               bool one_row_per_copy,
               const Tensor& rows_per_rank,
               const Tensor& row_token,
               const Tensor& row_slot,
               const Tensor& row_choice,
               const Tensor& visit_row,
               const Tensor& visit_rank,
               const Tensor& scratch) {
  STD_TORCH_CHECK(expert_ids.dim() == 2, "plan_send: expert_ids must be a matrix");
  const Tensor& first = expert_ids;
  const int64_t num_tokens = first.size(0), top_k = first.size(1);
  STD_TORCH_CHECK(
      top_k >= 1 && top_k <= kMaxTopK, "plan_send: top_k must be in 1..", kMaxTopK, ", got ", top_k);
  STD_TORCH_CHECK(
      own_rank >= 0 && own_rank < num_ranks, "plan_send: own_rank must be a rank, got ", own_rank);
  const int64_t width = one_row_per_copy ? 1 : top_k < slots_per_rank ? top_k : slots_per_rank;
  const int64_t visits = one_row_per_copy || top_k < num_ranks ? top_k : num_ranks;
  const int64_t capacity = num_tokens * visits;
  const PlanSendArgs args{
      .expert_ids = data<int64_t>(expert_ids, "expert_ids", num_tokens * top_k, first),
      .slot_of_expert = data<int32_t>(slot_of_expert, "slot_of_expert", slot_of_expert.numel(), first),
      .num_tokens = num_tokens,
      .top_k = top_k,
      .num_experts = slot_of_expert.numel(),
      .num_ranks = num_ranks,
      .slots_per_rank = slots_per_rank,
      .own_rank = own_rank,
      .one_row_per_copy = one_row_per_copy,
      .max_visits = visits,
      .row_width = width,
      .rows_per_rank = data<int32_t>(rows_per_rank, "rows_per_rank", num_ranks, first),
      .row_token = data<int32_t>(row_token, "row_token", capacity, first),
      .row_slot = data<int32_t>(row_slot, "row_slot", capacity * width, first),
      .row_choice = data<int32_t>(row_choice, "row_choice", capacity * width, first),
      .visit_row = data<int32_t>(visit_row, "visit_row", capacity, first),
      .visit_rank = data<int32_t>(visit_rank, "visit_rank", capacity, first),
      .scratch = data<int32_t>(scratch, "scratch", scratch_size(num_tokens, num_ranks), first)};
  EP_RETURN_IF_CUDA(first, plan_send_cuda, args)
  plan_send_cpu(args, chunks_in_parallel);
}

void plan_arrival(const Tensor& row_slot,
                  const Tensor& rows_of_run,
                  const Tensor& run_order,
                  const Tensor& rows_per_slot,
                  const Tensor& position,
                  const Tensor& copy_row,
                  const Tensor& scratch) {
  STD_TORCH_CHECK(row_slot.dim() == 2, "plan_arrival: row_slot must be a matrix");
  const Tensor& first = row_slot;
  const int64_t num_rows = first.size(0), width = first.size(1);
  const int64_t num_runs = rows_of_run.numel(), num_slots = rows_per_slot.numel();
  STD_TORCH_CHECK(
      width >= 1 && width <= kMaxTopK, "plan_arrival: row_slot must have 1..", kMaxTopK, " columns");
  const PlanArrivalArgs args{
      .row_slot = data<int32_t>(row_slot, "row_slot", num_rows * width, first),
      .rows_of_run = data<int32_t>(rows_of_run, "rows_of_run", num_runs, first),
      .run_order = data<int32_t>(run_order, "run_order", num_runs, first),
      .num_rows = num_rows,
      .row_width = width,
      .num_runs = num_runs,
      .num_slots = num_slots,
      .rows_per_slot = data<int32_t>(rows_per_slot, "rows_per_slot", num_slots, first),
      .position = data<int32_t>(position, "position", num_rows * width, first),
      .copy_row = data<int32_t>(copy_row, "copy_row", num_rows * width, first),
      .scratch = data<int32_t>(scratch, "scratch", scratch_size(num_rows, num_slots), first)};
  EP_RETURN_IF_CUDA(first, plan_arrival_cuda, args)
  plan_arrival_cpu(args, chunks_in_parallel);
}

}  // namespace

EP_REGISTER({
  m.impl("plan_send", TORCH_BOX(&plan_send));
  m.impl("plan_arrival", TORCH_BOX(&plan_arrival));
})

}  // namespace ep
