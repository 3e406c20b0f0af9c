#include "enumeration.h"

#include <algorithm>

namespace ep {
namespace {

class Walk {
 public:
  Walk(const Shape& shape,
       int64_t nodes,
       Partial& partial,
       const int64_t* load,
       int64_t room,
       const Candidate& known,
       int64_t limit,
       Deadline deadline)
      : shape_(shape),
        per_node_(shape.groups / nodes),
        full_devices_(shape.experts - shape.groups * (shape.per_group - 1)),
        partial_(partial),
        load_(load),
        room_(room),
        best_(known),
        left_(limit),
        deadline_(deadline),
        device_(shape.experts),
        count_(shape.groups, 0),
        load_of_device_(shape.groups, 0) {}

  Enumerated run() {
    extend(0, 0, 0);
    return {best_, left_ >= 0};
  }

 private:
  void extend(int64_t expert, int64_t excess, int64_t value) {
    if (--left_ < 0) return;
    if (left_ % 1024 == 0 && std::chrono::steady_clock::now() >= deadline_) left_ = -1;
    if (expert == shape_.experts) return take(excess, value);
    if (excess > best_.excess) return;
    if (excess == best_.excess) {
      const int64_t most = value + partial_.most_left(expert);
      if (found_ ? most <= best_.value : most < best_.value) return;
    }
    for (int64_t d = 0; d < shape_.groups; ++d) {
      const int64_t previous = d % per_node_ ? d - 1 : d - per_node_;  // must be in use before d is
      const bool fresh = count_[d] == 0;
      if (fresh && previous >= 0 && count_[previous] == 0) continue;
      const bool fills = count_[d] == shape_.per_group - 1;
      if (count_[d] == shape_.per_group || (fills && full_ == full_devices_)) continue;
      const int64_t over = std::max(load_of_device_[d] + load_[expert] - room_, int64_t{0}) -
                           std::max(load_of_device_[d] - room_, int64_t{0});
      device_[expert] = static_cast<int32_t>(d);
      ++count_[d], full_ += fills, load_of_device_[d] += load_[expert];
      const int64_t grown = partial_.add(expert, d);
      extend(expert + 1, excess + over, value + grown);
      partial_.remove(expert, d);
      --count_[d], full_ -= fills, load_of_device_[d] -= load_[expert];
      if (left_ < 0) return;
    }
  }

  void take(int64_t excess, int64_t value) {
    const Candidate found{device_, excess, value};
    // The first of all equal ones: what was known before may be a later one.
    if (!found.better_than(best_) && (found_ || best_.better_than(found))) return;
    best_ = found;
    found_ = true;
  }

  const Shape shape_;
  const int64_t per_node_, full_devices_;
  Partial& partial_;
  const int64_t* load_;
  const int64_t room_;
  Candidate best_;
  bool found_ = false;
  int64_t left_;
  const Deadline deadline_;
  std::vector<int32_t> device_;
  std::vector<int64_t> count_, load_of_device_;
  int64_t full_ = 0;
};

}  // namespace

PartialPairs::PartialPairs(const Shape& shape, int64_t nodes, int64_t node_weight, const int64_t* pairs)
    : experts_(shape.experts), pairs_(pairs) {
  const int64_t n = experts_;
  for (const TreeLevel& tree : tree_levels(shape.groups, nodes, node_weight)) {
    const int64_t partners = tree.span * shape.per_group - 1;
    OfLevel level{tree, Matrix(tree.groups * n, 0), Matrix(n * n, 0)};
    for (int64_t first = 0; first < n; ++first) {
      for (int64_t i = first; i < n; ++i) {
        std::vector<int64_t> row(pairs + i * n + first, pairs + (i + 1) * n);
        std::sort(row.rbegin(), row.rend());
        const auto end = row.begin() + std::min<int64_t>(partners, row.size());
        for (auto at = row.begin(); at < end; ++at) level.largest[first * n + i] += *at;
      }
    }
    levels_.push_back(std::move(level));
  }
}

int64_t PartialPairs::add(int64_t expert, int64_t device) {
  int64_t grown = 0;
  for (OfLevel& level : levels_) {
    int64_t* tie = &level.tie[device / level.span * experts_];
    grown += level.weight * tie[expert];
    for (int64_t x = 0; x < experts_; ++x) tie[x] += pairs_[expert * experts_ + x];
  }
  return grown;
}

void PartialPairs::remove(int64_t expert, int64_t device) {
  for (OfLevel& level : levels_) {
    int64_t* tie = &level.tie[device / level.span * experts_];
    for (int64_t x = 0; x < experts_; ++x) tie[x] -= pairs_[expert * experts_ + x];
  }
}

int64_t PartialPairs::most_left(int64_t expert) const {
  int64_t most = 0;
  for (const OfLevel& level : levels_) {
    int64_t twice = 0;  // a pair of two that are left is met from both
    for (int64_t x = expert; x < experts_; ++x) {
      int64_t tie = 0;
      for (int64_t g = 0; g < level.groups; ++g) tie = std::max(tie, level.tie[g * experts_ + x]);
      twice += 2 * tie + level.largest[expert * experts_ + x];
    }
    most += level.weight * (twice / 2);
  }
  return most;
}

PartialSets::PartialSets(const Shape& shape, int64_t nodes, int64_t node_weight, const TokenSets& sets)
    : sets_(sets) {
  for (const TreeLevel& tree : tree_levels(shape.groups, nodes, node_weight)) {
    levels_.push_back({tree, std::vector<int8_t>(sets.size() * tree.groups, 0)});
  }
}

int64_t PartialSets::add(int64_t expert, int64_t device) {
  int64_t grown = 0;
  for (OfLevel& level : levels_) {
    for (int64_t at = sets_.first[expert]; at < sets_.first[expert + 1]; ++at) {
      const int64_t set = sets_.of_expert[at];
      if (level.seen[set * level.groups + device / level.span]++ == 0)
        grown -= level.weight * sets_.weight[set];
    }
  }
  return grown;
}

void PartialSets::remove(int64_t expert, int64_t device) {
  for (OfLevel& level : levels_) {
    for (int64_t at = sets_.first[expert]; at < sets_.first[expert + 1]; ++at) {
      --level.seen[sets_.of_expert[at] * level.groups + device / level.span];
    }
  }
}

Enumerated enumerate(const Shape& shape,
                     int64_t nodes,
                     Partial& partial,
                     const int64_t* load,
                     int64_t room,
                     const Candidate& known,
                     int64_t limit,
                     Deadline deadline) {
  return Walk(shape, nodes, partial, load, room, known, limit, deadline).run();
}

}  // namespace ep
