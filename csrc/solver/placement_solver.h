// solve_placement: which experts share a device, so that the experts of a token lie on few devices.
//
// A device has ceil(E / D) slots; devices hold as many experts or one less. Nodes are equal runs of devices.
// Either of two things is made large:
//
//   pairs  the co-activated pairs inside a device, plus node_weight times those inside a node
//   sets   minus the distinct devices of all tokens, minus node_weight times their distinct nodes: what
//   travels,
//          also for top_k > 2, where pairs are a stand-in
//
// A cap on the load of a device comes before either: of two placements the one that exceeds it less is
// better.
#pragma once

#include <cstdint>
#include <vector>

namespace ep {

struct PlacementProblem {
  int64_t num_experts;
  int64_t devices;      // in [1, num_experts]
  int64_t nodes;        // divides devices
  int64_t node_weight;  // unread where nodes is 1
  const int64_t*
      pairs;  // [num_experts, num_experts], symmetric, 0 on the diagonal; null: count them in `tokens`
  const int16_t* tokens;  // [num_tokens, top_k], distinct experts of a token; null: pairs are the objective
  int64_t num_tokens;
  int64_t top_k;
  const int64_t* load;  // [num_experts]
  int64_t room;         // most load of a device
};

struct PlacementEffort {
  uint64_t seed;
  int64_t starts;      // of the search over pairs
  int64_t refined;     // of their ends that are refined over sets
  int64_t steps;       // swaps of one search without a better placement, before it ends
  int64_t partitions;  // partial assignments that are looked at one by one; beyond, the optimum is not proven
  double seconds;      // after which no further swap is made
};

struct FoundPlacement {
  std::vector<int32_t> device_of_expert;
  int64_t value;   // of the objective
  int64_t excess;  // load beyond `room`, summed over devices
  bool proven;     // no other placement is better
  bool cut_short;  // by `seconds`
};

// The same answer for the same arguments, unless it is cut short. Of equal placements that were all looked
// at, the first in the order of (device of expert 0, device of expert 1, ...), devices being numbered as they
// are first used.
FoundPlacement solve_placement(const PlacementProblem& problem, const PlacementEffort& effort);

}  // namespace ep
