#include "starts.h"

#include <algorithm>
#include <numeric>

namespace ep {
namespace {

// The best of a few searches over pairs alone.
std::vector<int32_t> grouped(
    const Shape& shape, const int64_t* pairs, int64_t patience, Deadline deadline, Random& random) {
  constexpr int64_t kSearches = 3;
  Levels levels;
  levels.push_back(std::make_unique<PairLevel>(shape, 1, 1, pairs));
  Search search(shape, std::move(levels), nullptr, 0);
  Candidate best = search.improve(greedy(shape, pairs), patience, INT64_MAX, deadline, random);
  for (int64_t count = 1; count < kSearches; ++count) {
    const Candidate found = search.improve(shuffled(shape, random), patience, INT64_MAX, deadline, random);
    if (found.better_than(best)) best = found;
  }
  return best.group_of_item;
}

Matrix between(const Shape& shape, const int64_t* pairs, const std::vector<int32_t>& group) {
  Matrix sums(shape.groups * shape.groups, 0);
  for (int64_t i = 0; i < shape.experts; ++i) {
    for (int64_t j = 0; j < shape.experts; ++j) {
      if (group[i] != group[j]) sums[group[i] * shape.groups + group[j]] += pairs[i * shape.experts + j];
    }
  }
  return sums;
}

}  // namespace

std::vector<int32_t> in_order(const Shape& shape) {
  std::vector<int32_t> group(shape.items());
  std::vector<int64_t> held(shape.groups, 0);
  for (int64_t i = 0; i < shape.experts; ++i) {
    group[i] = static_cast<int32_t>(i * shape.groups / shape.experts);
    ++held[group[i]];
  }
  int64_t item = shape.experts;
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (; held[g] < shape.per_group; ++held[g]) group[item++] = static_cast<int32_t>(g);
  }
  return group;
}

std::vector<int32_t> shuffled(const Shape& shape, Random& random) {
  std::vector<int32_t> group = in_order(shape);
  for (int64_t i = shape.experts - 1; i > 0; --i) std::swap(group[i], group[random.below(i + 1)]);
  return group;
}

std::vector<int32_t> greedy(const Shape& shape, const int64_t* pairs) {
  const int64_t n = shape.experts;
  std::vector<int32_t> group = in_order(shape);  // for how many each group gets, and the empty slots
  std::vector<int64_t> wanted(shape.groups, 0);
  for (int64_t i = 0; i < n; ++i) ++wanted[group[i]];
  std::fill_n(group.begin(), n, -1);
  // The free expert that has most, or least, pairs with the experts of `with`, all placed ones if negative.
  const auto extreme = [&](int64_t with, int64_t sign) {
    int64_t best = -1, best_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (group[i] >= 0) continue;
      int64_t sum = 0;
      for (int64_t j = 0; j < n; ++j) {
        if (with < 0 ? group[j] >= 0 : group[j] == with) sum += sign * pairs[i * n + j];
      }
      if (best < 0 || sum > best_sum) best = i, best_sum = sum;
    }
    return best;
  };
  const int64_t most = std::max_element(pairs, pairs + n * n) - pairs;
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t seed = g == 0 ? most / n : extreme(-1, -1);
    group[seed] = static_cast<int32_t>(g);
    if (g == 0 && wanted[0] > 1 && n > 1 && most / n != most % n) group[most % n] = 0;
  }
  for (int64_t g = 0; g < shape.groups; ++g) {
    while (std::count(group.begin(), group.begin() + n, g) < wanted[g])
      group[extreme(g, 1)] = static_cast<int32_t>(g);
  }
  return group;
}

std::vector<int32_t> devices_then_nodes(const Shape& shape,
                                        int64_t nodes,
                                        const int64_t* pairs,
                                        int64_t patience,
                                        Deadline deadline,
                                        Random& random) {
  std::vector<int32_t> group = grouped(shape, pairs, patience, deadline, random);
  const Matrix sums = between(shape, pairs, group);
  const Shape of_devices{shape.groups, nodes, shape.groups / nodes, 0};
  const std::vector<int32_t> node = grouped(of_devices, sums.data(), patience, deadline, random);
  std::vector<int32_t> order(shape.groups), place(shape.groups);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return node[a] < node[b]; });
  for (int64_t at = 0; at < shape.groups; ++at) place[order[at]] = static_cast<int32_t>(at);
  for (int32_t& g : group) g = place[g];
  return group;
}

std::vector<int32_t> nodes_then_devices(const Shape& shape,
                                        int64_t nodes,
                                        const int64_t* pairs,
                                        int64_t patience,
                                        Deadline deadline,
                                        Random& random) {
  const int64_t devices = shape.groups / nodes;
  const Shape of_nodes{shape.experts, nodes, devices * shape.per_group, devices * shape.most_empty};
  const std::vector<int32_t> node = grouped(of_nodes, pairs, patience, deadline, random);
  std::vector<int32_t> group(shape.items());
  for (int64_t n = 0; n < nodes; ++n) {
    std::vector<int64_t> items;  // experts come first
    for (int64_t i = 0; i < shape.items(); ++i) {
      if (node[i] == n) items.push_back(i);
    }
    const int64_t experts =
        std::count_if(items.begin(), items.end(), [&](int64_t i) { return i < shape.experts; });
    Matrix inside(experts * experts);
    for (int64_t a = 0; a < experts; ++a) {
      for (int64_t b = 0; b < experts; ++b)
        inside[a * experts + b] = pairs[items[a] * shape.experts + items[b]];
    }
    const Shape of_devices{experts, devices, shape.per_group, shape.most_empty};
    const std::vector<int32_t> device = grouped(of_devices, inside.data(), patience, deadline, random);
    for (size_t at = 0; at < items.size(); ++at) {
      group[items[at]] = static_cast<int32_t>(n * devices + device[at]);
    }
  }
  return group;
}

}  // namespace ep
