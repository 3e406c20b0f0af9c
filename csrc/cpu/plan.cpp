#include "plan.h"

#include <algorithm>

namespace ep {
namespace {

// One of a token's choices, with what a row tells its rank about it.
struct Choice {
  int32_t slot;    // global
  int32_t choice;  // column of expert_ids
  int64_t expert;
};

void sort_choices(const PlanSendArgs& args, int64_t token, Choice* choices) {
  for (int64_t k = 0; k < args.top_k; ++k) {
    const int64_t expert = args.expert_ids[token * args.top_k + k];
    const Choice next{args.slot_of_expert[expert], static_cast<int32_t>(k), expert};
    int64_t at = k;  // insertion: top_k is small
    while (at > 0 && (args.one_row_per_copy ? choices[at - 1].expert > next.expert
                                            : choices[at - 1].slot > next.slot)) {
      choices[at] = choices[at - 1];
      --at;
    }
    choices[at] = next;
  }
}

// Calls visit(rank, first, last) for each row of a token: choices [first, last) share it.
template <typename Visit>
void for_each_visit(const PlanSendArgs& args, const Choice* choices, Visit visit) {
  int64_t first = 0;
  while (first < args.top_k) {
    const int64_t rank = choices[first].slot / args.slots_per_rank;
    int64_t last = first + 1;
    if (!args.one_row_per_copy) {
      while (last < args.top_k && choices[last].slot / args.slots_per_rank == rank) ++last;
    }
    visit(rank, first, last);
    first = last;
  }
}

}  // namespace

void plan_send_cpu(const PlanSendArgs& args) {
  const int64_t capacity = args.num_tokens * args.max_visits;
  std::fill_n(args.rows_per_rank, args.num_ranks, 0);
  std::fill_n(args.row_token, capacity, -1);
  std::fill_n(args.row_slot, capacity * args.row_width, -1);
  std::fill_n(args.row_choice, capacity * args.row_width, -1);
  std::fill_n(args.visit_row, capacity, -1);
  std::fill_n(args.visit_rank, capacity, -1);

  Choice choices[kMaxTopK];
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    sort_choices(args, token, choices);
    for_each_visit(args, choices, [&](int64_t rank, int64_t, int64_t) { ++args.rows_per_rank[rank]; });
  }
  int32_t* next_row = args.scratch;  // [num_ranks]
  int32_t end = 0;
  for (int64_t rank = 0; rank < args.num_ranks; ++rank) {
    next_row[rank] = end;
    if (rank != args.own_rank) end += args.rows_per_rank[rank];
  }
  next_row[args.own_rank] = end;

  for (int64_t token = 0; token < args.num_tokens; ++token) {
    sort_choices(args, token, choices);
    int64_t visit = token * args.max_visits;
    for_each_visit(args, choices, [&](int64_t rank, int64_t first, int64_t last) {
      const int32_t row = next_row[rank]++;
      args.row_token[row] = static_cast<int32_t>(token);
      for (int64_t c = first; c < last; ++c) {
        args.row_slot[row * args.row_width + c - first] =
            choices[c].slot - static_cast<int32_t>(rank * args.slots_per_rank);
        args.row_choice[row * args.row_width + c - first] = choices[c].choice;
      }
      args.visit_row[visit] = row;
      args.visit_rank[visit] = static_cast<int32_t>(rank);
      ++visit;
    });
  }
}

void plan_arrival_cpu(const PlanArrivalArgs& args) {
  std::fill_n(args.rows_per_slot, args.num_slots, 0);
  std::fill_n(args.position, args.num_rows * args.row_width, -1);
  std::fill_n(args.copy_row, args.num_rows * args.row_width, -1);

  int64_t before = 0, total = 0;  // rows from ranks before the own one, and from all
  for (int64_t rank = 0; rank < args.num_ranks; ++rank) {
    if (rank < args.own_rank) before += args.rows_from_rank[rank];
    total += args.rows_from_rank[rank];
  }
  const int64_t own = args.rows_from_rank[args.own_rank];

  for (int64_t i = 0; i < total * args.row_width; ++i) {
    if (args.row_slot[i] >= 0) ++args.rows_per_slot[args.row_slot[i]];
  }
  int32_t* next = args.scratch;  // [num_slots]
  int32_t end = 0;
  for (int64_t slot = 0; slot < args.num_slots; ++slot) {
    next[slot] = end;
    end += args.rows_per_slot[slot];
  }
  for (int64_t i = 0; i < total; ++i) {
    // The own rows stand last in memory, but between those of their neighbours in the order of tokens.
    const int64_t row = i < before ? i : i < before + own ? total - own + i - before : i - own;
    for (int64_t c = 0; c < args.row_width; ++c) {
      const int32_t slot = args.row_slot[row * args.row_width + c];
      if (slot < 0) break;
      const int32_t position = next[slot]++;
      args.position[row * args.row_width + c] = position;
      args.copy_row[position] = static_cast<int32_t>(row);
    }
  }
}

}  // namespace ep
