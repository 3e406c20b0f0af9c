#include "search.h"

#include <algorithm>

namespace ep {
namespace {

constexpr int64_t kPriceEvery = 8;  // steps after which the price of load beyond the room may change
constexpr double kPriceStep = 1.5;

}  // namespace

uint64_t Random::next() {
  uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

Search::Search(const Shape& shape, Levels levels, const int64_t* load, int64_t room)
    : shape_(shape),
      levels_(std::move(levels)),
      load_(shape.items(), 0),
      room_(load ? room : INT64_MAX),
      barred_until_(shape.items() * shape.groups, 0) {
  if (load) std::copy(load, load + shape.experts, load_.begin());
}

Candidate Search::judge(const std::vector<int32_t>& group_of_item) {
  group_ = group_of_item;
  load_of_group_.assign(shape_.groups, 0);
  empty_of_group_.assign(shape_.groups, 0);
  for (int64_t i = 0; i < shape_.items(); ++i) {
    load_of_group_[group_[i]] += load_[i];
    empty_of_group_[group_[i]] += i >= shape_.experts;
  }
  excess_ = 0;
  for (int64_t load : load_of_group_) excess_ += std::max(load - room_, int64_t{0});
  for (auto& level : levels_) level->reset(group_);
  return here();
}

Candidate Search::here() const {
  int64_t value = 0;
  for (const auto& level : levels_) value += level->value();
  return {group_, excess_, value};
}

int64_t Search::relief(int64_t i, int64_t j) const {
  const int64_t a = load_of_group_[group_[i]], b = load_of_group_[group_[j]], moved = load_[i] - load_[j];
  const auto over = [this](int64_t load) { return std::max(load - room_, int64_t{0}); };
  return over(a) + over(b) - over(a - moved) - over(b + moved);
}

Search::Swap Search::choose(const Candidate& best, int64_t step, double price) const {
  const bool capped = room_ != INT64_MAX;
  int64_t value = 0;
  for (const auto& level : levels_) value += level->value();
  Swap chosen;
  double most = 0;
  for (int64_t i = 0; i < shape_.experts; ++i) {
    const int64_t a = group_[i];
    for (int64_t j = i + 1; j < shape_.items(); ++j) {
      const int64_t b = group_[j];
      if (a == b || (j >= shape_.experts && empty_of_group_[a] == shape_.most_empty)) continue;
      int64_t gain = 0;
      for (const auto& level : levels_) gain += level->gain(i, j);
      const int64_t less = capped ? relief(i, j) : 0;
      const double score = static_cast<double>(gain) + price * static_cast<double>(less);
      if (chosen.i >= 0 && score <= most) continue;
      const bool barred =
          barred_until_[i * shape_.groups + b] > step || barred_until_[j * shape_.groups + a] > step;
      if (barred) {  // unless it leads where the search has not been
        const int64_t excess = excess_ - less;
        if (excess != best.excess ? excess > best.excess : value + gain <= best.value) continue;
      }
      chosen = {i, j, gain, less};
      most = score;
    }
  }
  return chosen;
}

void Search::make(const Swap& swap) {
  const auto [i, j, gain, relief] = swap;
  const int32_t a = group_[i], b = group_[j];
  for (auto& level : levels_) level->swap(i, j);
  load_of_group_[a] += load_[j] - load_[i];
  load_of_group_[b] += load_[i] - load_[j];
  const bool empty = j >= shape_.experts;
  empty_of_group_[a] += empty;
  empty_of_group_[b] -= empty;
  excess_ -= relief;
  std::swap(group_[i], group_[j]);
}

Candidate Search::improve(
    const std::vector<int32_t>& start, int64_t patience, int64_t enough, Deadline deadline, Random& random) {
  Candidate best = judge(start);
  std::fill(barred_until_.begin(), barred_until_.end(), 0);
  const int64_t shortest = 2 + shape_.experts / 8;
  double price = 1.0;
  int64_t fits = 0;  // steps in a row within the room, negative: beyond it
  for (int64_t step = 1, last = 0; step - last <= patience; ++step) {
    if (best.excess == 0 && best.value >= enough) break;
    if (std::chrono::steady_clock::now() >= deadline) {
      cut_short_ = true;
      break;
    }
    const Swap swap = choose(best, step, price);
    if (swap.i < 0) break;  // one group, or all is barred
    const int64_t until = step + shortest + random.below(shortest);
    barred_until_[swap.i * shape_.groups + group_[swap.i]] = until;
    barred_until_[swap.j * shape_.groups + group_[swap.j]] = until;
    make(swap);
    int64_t value = 0;
    for (const auto& level : levels_) value += level->value();
    if (excess_ != best.excess ? excess_ < best.excess : value > best.value) {
      best = here();
      last = step;
    }
    // Load beyond the room costs more the longer the search is there, and less the longer it is not: the
    // border of what is allowed is where the best placements are.
    fits = excess_ == 0 ? std::max(fits, int64_t{0}) + 1 : std::min(fits, int64_t{0}) - 1;
    if (fits % kPriceEvery == 0) price *= fits < 0 ? kPriceStep : 1 / kPriceStep;
  }
  return best;
}

}  // namespace ep
