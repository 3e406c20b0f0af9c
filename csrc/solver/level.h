// How an assignment is judged at one level of the tree, devices or nodes, and what any swap of two experts
// would gain.
//
// The gain of swapping i (group a) and j (group b) is   tie[b, i] + own[i] + tie[a, j] + own[j] - both[i, j].
//
//            pairs                                  sets of tokens
//   tie[g, i]   pairs of i with the experts in g    tokens of i that have an expert in g
//   own[i]      minus the pairs of i at home        tokens of i whose only expert at home is i, minus tokens
//   of i both[i, j]  twice the pairs of i and j          their tokens where i, and those where j, is alone at
//   home
#pragma once

#include <cstdint>
#include <vector>

namespace ep {

using Matrix = std::vector<int64_t>;

// Experts, then as many items without ties as there are empty slots.
struct Shape {
  int64_t experts;
  int64_t groups;
  int64_t per_group;   // slots
  int64_t most_empty;  // empty slots of a group

  int64_t items() const { return groups * per_group; }
};

// Devices, and nodes where there are several: what a group of each counts, and of how many devices it is a
// run.
struct TreeLevel {
  int64_t groups, span, weight;
};

std::vector<TreeLevel> tree_levels(int64_t devices, int64_t nodes, int64_t node_weight);

// Tokens with the same experts, once, and which of them an expert has.
struct TokenSets {
  TokenSets(const int16_t* tokens, int64_t num_tokens, int64_t top_k, int64_t num_experts);

  Matrix pairs(int64_t num_experts) const;
  int64_t size() const { return static_cast<int64_t>(weight.size()); }

  int64_t top_k;
  std::vector<int16_t> members;  // [size, top_k], ascending
  std::vector<int64_t> weight;   // [size] tokens
  std::vector<int64_t> first;    // [num_experts + 1] into of_expert
  std::vector<int32_t> of_expert;
};

class Level {
 public:
  // Groups are runs of `span` groups of the innermost level; a unit of this level counts `weight`.
  Level(const Shape& shape, int64_t span, int64_t weight);
  virtual ~Level() = default;

  void reset(const std::vector<int32_t>& innermost);
  void swap(int64_t i, int64_t j);  // items i and j trade their groups

  int64_t value() const { return value_ * weight_; }
  int64_t gain(int64_t i, int64_t j) const {
    const int64_t a = group_[i], b = group_[j];
    if (a == b) return 0;
    return weight_ *
           (tie_[b * items_ + i] + own_[i] + tie_[a * items_ + j] + own_[j] - both_[i * items_ + j]);
  }

 protected:
  virtual int64_t count() = 0;                   // fills tie_, own_ and both_; the value
  virtual void trade(int64_t i, int64_t j) = 0;  // the same after i and j have traded; also trades group_

  int64_t items_, groups_, span_, weight_;
  std::vector<int32_t> group_;
  Matrix tie_, own_, both_;  // [groups, items], [items], [items, items]

 private:
  int64_t value_ = 0;
};

class PairLevel : public Level {
 public:
  PairLevel(const Shape& shape, int64_t span, int64_t weight, const int64_t* pairs);

 protected:
  int64_t count() override;
  void trade(int64_t i, int64_t j) override;

 private:
  int64_t experts_;
};

class SetLevel : public Level {
 public:
  SetLevel(const Shape& shape, int64_t span, int64_t weight, const TokenSets& sets);

 protected:
  int64_t count() override;
  void trade(int64_t i, int64_t j) override;

 private:
  int64_t add(int64_t set, int64_t sign);  // returns its distinct groups
  void add_of(int64_t i, int64_t j, int64_t sign);

  const TokenSets& sets_;
  std::vector<int32_t> seen_;   // [groups], zero between calls: experts of a set in a group
  std::vector<int32_t> stamp_;  // [sets] of the last walk that met it
  int32_t walk_ = 0;
};

}  // namespace ep
