#include "level.h"

#include <algorithm>
#include <numeric>

namespace ep {

std::vector<TreeLevel> tree_levels(int64_t devices, int64_t nodes, int64_t node_weight) {
  std::vector<TreeLevel> levels{{devices, 1, 1}};
  if (nodes > 1) levels.push_back({nodes, devices / nodes, node_weight});
  return levels;
}

TokenSets::TokenSets(const int16_t* tokens, int64_t num_tokens, int64_t k, int64_t num_experts) : top_k(k) {
  std::vector<int16_t> sorted(tokens, tokens + num_tokens * k);
  const auto row = [&](int64_t t) { return sorted.begin() + t * k; };
  for (int64_t t = 0; t < num_tokens; ++t) std::sort(row(t), row(t + 1));
  std::vector<int32_t> order(num_tokens);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return std::lexicographical_compare(row(a), row(a + 1), row(b), row(b + 1));
  });
  for (int32_t t : order) {
    if (!weight.empty() && std::equal(row(t), row(t + 1), members.end() - k)) {
      ++weight.back();
    } else {
      members.insert(members.end(), row(t), row(t + 1));
      weight.push_back(1);
    }
  }
  first.assign(num_experts + 1, 0);
  for (int16_t expert : members) ++first[expert + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  of_expert.resize(members.size());
  for (size_t at = 0; at < members.size(); ++at)
    of_expert[next[members[at]]++] = static_cast<int32_t>(at / k);
}

Matrix TokenSets::pairs(int64_t num_experts) const {
  Matrix counts(num_experts * num_experts, 0);
  for (int64_t set = 0; set < size(); ++set) {
    const int16_t* of = members.data() + set * top_k;
    for (int64_t a = 0; a < top_k; ++a) {
      for (int64_t b = 0; b < top_k; ++b) {
        if (a != b) counts[of[a] * num_experts + of[b]] += weight[set];
      }
    }
  }
  return counts;
}

Level::Level(const Shape& shape, int64_t span, int64_t weight)
    : items_(shape.items()),
      groups_(shape.groups / span),
      span_(span),
      weight_(weight),
      group_(items_),
      tie_(groups_ * items_),
      own_(items_),
      both_(items_ * items_) {}

void Level::reset(const std::vector<int32_t>& innermost) {
  for (int64_t i = 0; i < items_; ++i) group_[i] = static_cast<int32_t>(innermost[i] / span_);
  value_ = count();
}

void Level::swap(int64_t i, int64_t j) {
  if (group_[i] == group_[j]) return;
  value_ += gain(i, j) / weight_;
  trade(i, j);
}

PairLevel::PairLevel(const Shape& shape, int64_t span, int64_t weight, const int64_t* pairs)
    : Level(shape, span, weight), experts_(shape.experts) {
  for (int64_t i = 0; i < experts_; ++i) {
    for (int64_t j = 0; j < experts_; ++j) both_[i * items_ + j] = 2 * pairs[i * experts_ + j];
  }
}

int64_t PairLevel::count() {
  std::fill(tie_.begin(), tie_.end(), 0);
  for (int64_t i = 0; i < experts_; ++i) {
    for (int64_t j = 0; j < experts_; ++j) tie_[group_[i] * items_ + j] += both_[i * items_ + j] / 2;
  }
  for (int64_t i = 0; i < items_; ++i) own_[i] = -tie_[group_[i] * items_ + i];
  return -std::accumulate(own_.begin(), own_.end(), int64_t{0}) / 2;
}

void PairLevel::trade(int64_t i, int64_t j) {
  int64_t *a = &tie_[group_[i] * items_], *b = &tie_[group_[j] * items_];
  for (int64_t x = 0; x < experts_; ++x) {
    const int64_t moved = (both_[i * items_ + x] - both_[j * items_ + x]) / 2;
    a[x] -= moved;
    b[x] += moved;
  }
  std::swap(group_[i], group_[j]);
  for (int64_t x = 0; x < experts_; ++x) own_[x] = -tie_[group_[x] * items_ + x];
}

SetLevel::SetLevel(const Shape& shape, int64_t span, int64_t weight, const TokenSets& sets)
    : Level(shape, span, weight), sets_(sets), seen_(groups_, 0), stamp_(sets.size(), 0) {}

int64_t SetLevel::count() {
  for (Matrix* table : {&tie_, &own_, &both_}) std::fill(table->begin(), table->end(), 0);
  int64_t distinct = 0;
  for (int64_t set = 0; set < sets_.size(); ++set) distinct += sets_.weight[set] * add(set, 1);
  return -distinct;
}

int64_t SetLevel::add(int64_t set, int64_t sign) {
  const int64_t k = sets_.top_k, amount = sign * sets_.weight[set];
  const int16_t* members = &sets_.members[set * k];
  for (int64_t a = 0; a < k; ++a) ++seen_[group_[members[a]]];
  int64_t distinct = 0;
  for (int64_t a = 0; a < k; ++a) {
    const int64_t x = members[a], home = group_[x];
    own_[x] -= amount;
    if (seen_[home] == 1) {
      own_[x] += amount;
      for (int64_t b = 0; b < k; ++b) {
        if (b == a) continue;
        both_[x * items_ + members[b]] += amount;
        both_[members[b] * items_ + x] += amount;
      }
    }
    const bool counted = std::any_of(members, members + a, [&](int16_t y) { return group_[y] == home; });
    if (counted) continue;
    ++distinct;
    for (int64_t b = 0; b < k; ++b) tie_[home * items_ + members[b]] += amount;
  }
  for (int64_t a = 0; a < k; ++a) seen_[group_[members[a]]] = 0;
  return distinct;
}

void SetLevel::add_of(int64_t i, int64_t j, int64_t sign) {
  ++walk_;
  for (int64_t x : {i, j}) {
    if (x >= static_cast<int64_t>(sets_.first.size()) - 1) continue;  // an empty slot
    for (int64_t at = sets_.first[x]; at < sets_.first[x + 1]; ++at) {
      const int32_t set = sets_.of_expert[at];
      if (stamp_[set] == walk_) continue;
      stamp_[set] = walk_;
      add(set, sign);
    }
  }
}

void SetLevel::trade(int64_t i, int64_t j) {
  add_of(i, j, -1);
  std::swap(group_[i], group_[j]);
  add_of(i, j, 1);
}

}  // namespace ep
