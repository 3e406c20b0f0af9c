#include "placement_solver.h"

#include <algorithm>
#include <limits>

#include "enumeration.h"
#include "starts.h"

namespace ep {
namespace {

constexpr int64_t kEnumerated = 32;   // experts; of more, no bound cuts enough
constexpr int64_t kSetsInAStep = 64;  // of one expert: as much work as one partial assignment over pairs

struct Tree {
  Shape shape;
  int64_t nodes;
  int64_t node_weight;
};

template <class LevelKind, class Source>
Levels levels_of(const Tree& tree, const Source& source) {
  Levels levels;
  for (const TreeLevel& level : tree_levels(tree.shape.groups, tree.nodes, tree.node_weight)) {
    levels.push_back(std::make_unique<LevelKind>(tree.shape, level.span, level.weight, source));
  }
  return levels;
}

// What no placement can be better than: all pairs inside, or one device and node for every token.
int64_t most_pairs(const Tree& tree, const Matrix& pairs) {
  int64_t sum = 0;
  for (int64_t mass : pairs) sum += mass;
  return sum / 2 * (tree.nodes > 1 ? 1 + tree.node_weight : 1);
}

int64_t most_sets(const Tree& tree, const TokenSets& sets) {
  int64_t tokens = 0;
  for (int64_t weight : sets.weight) tokens += weight;
  const auto least = [&](int64_t slots) { return tokens * ((sets.top_k + slots - 1) / slots); };
  const int64_t devices = least(tree.shape.per_group);
  if (tree.nodes == 1) return -devices;
  return -devices - tree.node_weight * least(tree.shape.per_group * tree.shape.groups / tree.nodes);
}

std::vector<std::vector<int32_t>> starts_of(
    const Tree& tree, const Matrix& pairs, const PlacementEffort& effort, Deadline deadline, Random& random) {
  std::vector<std::vector<int32_t>> starts{in_order(tree.shape), greedy(tree.shape, pairs.data())};
  if (tree.nodes > 1) {
    for (auto way : {devices_then_nodes, nodes_then_devices}) {
      starts.push_back(way(tree.shape, tree.nodes, pairs.data(), effort.steps, deadline, random));
    }
  }
  while (static_cast<int64_t>(starts.size()) < effort.starts) starts.push_back(shuffled(tree.shape, random));
  return starts;
}

// Devices in the order in which experts use them, inside nodes in that order.
void renumber(const Tree& tree, std::vector<int32_t>& device_of_expert) {
  const int64_t per_node = tree.shape.groups / tree.nodes;
  std::vector<int32_t> node(tree.nodes, -1), device(tree.shape.groups, -1), used(tree.nodes, 0);
  int32_t nodes_used = 0;
  for (int32_t& d : device_of_expert) {
    const int64_t of = d / per_node;
    if (node[of] < 0) node[of] = nodes_used++;
    if (device[d] < 0) device[d] = static_cast<int32_t>(node[of] * per_node) + used[of]++;
    d = device[d];
  }
}

void keep_better(Candidate& best, Candidate found) {
  if (found.better_than(best)) best = std::move(found);
}

}  // namespace

FoundPlacement solve_placement(const PlacementProblem& problem, const PlacementEffort& effort) {
  const int64_t n = problem.num_experts, slots = (n + problem.devices - 1) / problem.devices;
  // Nodes of one device each are no level of their own.
  const int64_t nodes = problem.nodes == problem.devices ? 1 : problem.nodes;
  const Tree tree{{n, problem.devices, slots, n % problem.devices ? 1 : 0}, nodes, problem.node_weight};
  const Deadline deadline =
      std::chrono::steady_clock::now() +
      std::chrono::nanoseconds(static_cast<int64_t>(std::min(effort.seconds, 1e9) * 1e9));
  Random random(effort.seed);

  const bool by_sets = problem.tokens != nullptr;
  const TokenSets sets(problem.tokens, by_sets ? problem.num_tokens : 0, problem.top_k, n);
  const Matrix pairs = problem.pairs ? Matrix(problem.pairs, problem.pairs + n * n) : sets.pairs(n);

  // Over pairs first: a swap there costs far less.
  Search over_pairs(tree.shape, levels_of<PairLevel>(tree, pairs.data()), problem.load, problem.room);
  const int64_t most = most_pairs(tree, pairs);
  std::vector<std::vector<int32_t>> starts = starts_of(tree, pairs, effort, deadline, random);
  std::vector<Candidate> ends;
  for (const auto& start : starts) {
    ends.push_back(over_pairs.improve(start, effort.steps, most, deadline, random));
    if (!by_sets && ends.back().excess == 0 && ends.back().value >= most) break;
  }

  Candidate best{{}, std::numeric_limits<int64_t>::max(), 0};
  bool cut_short = over_pairs.cut_short();
  int64_t bound = most;
  std::unique_ptr<Partial> partial;
  if (by_sets) {
    Search over_sets(tree.shape, levels_of<SetLevel>(tree, sets), problem.load, problem.room);
    bound = most_sets(tree, sets);
    std::vector<Candidate> judged;
    for (const auto& start : starts) judged.push_back(over_sets.judge(start));
    for (const Candidate& end : ends) judged.push_back(over_sets.judge(end.group_of_item));
    std::stable_sort(judged.begin(), judged.end(), [](auto& a, auto& b) { return a.better_than(b); });
    for (size_t at = 0; at < judged.size() && at < static_cast<size_t>(effort.refined); ++at) {
      keep_better(best, over_sets.improve(judged[at].group_of_item, effort.steps, bound, deadline, random));
    }
    cut_short |= over_sets.cut_short();
    partial = std::make_unique<PartialSets>(tree.shape, tree.nodes, tree.node_weight, sets);
  } else {
    for (Candidate& end : ends) keep_better(best, std::move(end));
  }

  bool proven = best.excess == 0 && best.value >= bound;
  if (n <= kEnumerated) {
    if (!partial) {
      partial = std::make_unique<PartialPairs>(tree.shape, tree.nodes, tree.node_weight, pairs.data());
    }
    const int64_t work = by_sets ? std::max<int64_t>(sets.size() * sets.top_k / n / kSetsInAStep, 1) : 1;
    const Enumerated all = enumerate(tree.shape,
                                     tree.nodes,
                                     *partial,
                                     problem.load,
                                     problem.room,
                                     best,
                                     effort.partitions / work,
                                     deadline);
    best = all.best;
    proven |= all.complete;
    cut_short |= !all.complete && std::chrono::steady_clock::now() >= deadline;
  }
  best.group_of_item.resize(n);
  renumber(tree, best.group_of_item);
  return {std::move(best.group_of_item), best.value, best.excess, proven, cut_short};
}

}  // namespace ep
