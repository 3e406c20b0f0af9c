#include "choose_experts.h"

#include <algorithm>
#include <vector>

#include "exp.h"
#include "vectorise.h"

namespace ep {
namespace {

constexpr int64_t kBlock = 16;  // scores that are looked at together
constexpr float kLeast = -__builtin_inff();

int64_t padded(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// The best experts met so far, best first; of equal scores the lower id is better, and so is any to a NaN.
class Best {
 public:
  explicit Best(int64_t capacity) : capacity_(capacity) {}

  void offer(float score, int32_t id) {
    if (size_ == capacity_ && !better(score, id, size_ - 1)) return;
    int64_t at = size_ < capacity_ ? size_++ : size_ - 1;
    for (; at > 0 && better(score, id, at - 1); --at) {
      scores_[at] = scores_[at - 1];
      ids_[at] = ids_[at - 1];
    }
    scores_[at] = score;
    ids_[at] = id;
  }

  int64_t size() const { return size_; }
  int32_t id(int64_t i) const { return ids_[i]; }
  bool full() const { return size_ == capacity_; }
  float least() const { return scores_[size_ - 1]; }

 private:
  bool better(float score, int32_t id, int64_t at) const {
    if (score > scores_[at]) return true;
    if (score < scores_[at]) return false;
    const bool nan = score != score, other_nan = scores_[at] != scores_[at];
    return nan == other_nan ? id < ids_[at] : other_nan;
  }

  int64_t capacity_, size_ = 0;
  float scores_[kMaxExperts];
  int32_t ids_[kMaxExperts];
};

// Offers ids [begin, end) in ascending order. Once `best` is full a block is looked into only if one of its
// scores is above the least of them: an id that is equal comes later, so it is not better.
void offer_range(Best& best, const float* scores, int64_t begin, int64_t end) {
  int64_t e = begin;
  for (; e < end && !best.full(); ++e) best.offer(scores[e], static_cast<int32_t>(e));
  if (e == end) return;
  const auto offer_better = [&](int64_t id) {
    if (scores[id] > best.least() || best.least() != best.least()) {
      best.offer(scores[id], static_cast<int32_t>(id));
    }
  };
  for (; e < end && e % kBlock != 0; ++e) offer_better(e);
  for (; e + kBlock <= end; e += kBlock) {
    const float least = best.least();
    int above = 0;
    for (int64_t i = 0; i < kBlock; ++i) above |= !(scores[e + i] <= least);
    if (above == 0) continue;
    for (int64_t i = 0; i < kBlock; ++i) offer_better(e + i);
  }
  for (; e < end; ++e) offer_better(e);
}

// What one thread needs for one token after the other.
class Chooser {
 public:
  explicit Chooser(const ChooseExpertsArgs& args)
      : args_(args), scores_(padded(args.num_experts)), probabilities_(padded(args.num_experts)) {}

  void choose(int64_t token) {
    const float* logits = args_.logits + token * args_.num_experts;
    int64_t* ids = args_.ids + token * args_.top_k;
    if (args_.score != Score::kSoftmaxOfChosen || args_.bias != nullptr || args_.group_top > 1) score(logits);
    if (args_.rule != Rule::kGiven) select(selection_scores(logits), ids);
    weigh(logits, ids, args_.weights + token * args_.top_k);
  }

 private:
  void score(const float* logits) {
    const int64_t num = args_.num_experts;
    float* __restrict out = probabilities_.data();
    if (args_.score == Score::kSigmoid) {
      for (int64_t e = 0; e < num; ++e) out[e] = sigmoid_of(logits[e]);
      return;
    }
    float most[kBlock], sums[kBlock] = {};
    std::fill_n(most, kBlock, kLeast);
    int64_t e = 0;
    for (; e + kBlock <= num; e += kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) most[i] = logits[e + i] > most[i] ? logits[e + i] : most[i];
    }
    for (; e < num; ++e) most[0] = std::max(most[0], logits[e]);
    const float largest = *std::max_element(most, most + kBlock);
    for (e = 0; e < num; ++e) out[e] = exp_of(logits[e] - largest);
    for (e = 0; e + kBlock <= num; e += kBlock) {
      for (int64_t i = 0; i < kBlock; ++i) sums[i] += out[e + i];
    }
    for (; e < num; ++e) sums[0] += out[e];
    float sum = 0.0f;
    for (const float part : sums) sum += part;
    for (e = 0; e < num; ++e) out[e] /= sum;
  }

  // The logits where they order experts as the scores do: scores may round two of them together.
  const float* selection_scores(const float* logits) {
    const bool summed = args_.rule == Rule::kGroupLimited && args_.group_top > 1;
    if (args_.bias == nullptr) return summed ? probabilities_.data() : logits;
    for (int64_t e = 0; e < args_.num_experts; ++e) scores_[e] = probabilities_[e] + args_.bias[e];
    return scores_.data();
  }

  void select(const float* scores, int64_t* ids) const {
    Best best(args_.top_k);
    switch (args_.rule) {
      case Rule::kGroupLimited:
        offer_best_groups(best, scores);
        break;
      case Rule::kC2R:
      case Rule::kC2RGrouped:
        return select_collaborators(scores, ids);
      default:
        offer_range(best, scores, 0, args_.num_experts);
    }
    for (int64_t k = 0; k < args_.top_k; ++k) ids[k] = best.id(k);
  }

  void offer_best_groups(Best& best, const float* scores) const {
    const int64_t size = args_.num_experts / args_.num_groups;
    Best groups(args_.max_groups);
    for (int64_t g = 0; g < args_.num_groups; ++g) {
      Best inside(std::min(args_.group_top, size));
      offer_range(inside, scores, g * size, (g + 1) * size);
      float sum = 0.0f;
      for (int64_t i = 0; i < inside.size(); ++i) sum += scores[inside.id(i)];
      groups.offer(sum, static_cast<int32_t>(g));
    }
    // In the order of ids, as `offer_range` needs it.
    int32_t chosen[kMaxExperts];
    for (int64_t i = 0; i < groups.size(); ++i) chosen[i] = groups.id(i);
    std::sort(chosen, chosen + groups.size());
    for (int64_t i = 0; i < groups.size(); ++i) {
      offer_range(best, scores, chosen[i] * size, (chosen[i] + 1) * size);
    }
  }

  void select_collaborators(const float* scores, int64_t* ids) const {
    Best first(1), partners(args_.top_k - 1);
    offer_range(first, scores, 0, args_.num_experts);
    ids[0] = first.id(0);
    if (args_.top_k == 1) return;
    const int32_t* list = args_.lists + ids[0] * args_.list_length;
    if (args_.rule == Rule::kC2R) {
      for (int64_t i = 0; i < args_.top_t; ++i) partners.offer(scores[list[i]], list[i]);
    } else {
      offer_inside_groups(partners, scores, list);
    }
    for (int64_t k = 1; k < args_.top_k; ++k) ids[k] = partners.id(k - 1);
  }

  // The first distinct groups met in score order are those whose best experts are best.
  void offer_inside_groups(Best& partners, const float* scores, const int32_t* list) const {
    int32_t best_of[kMaxExperts];
    std::fill_n(best_of, args_.num_groups, -1);
    for (int32_t e = 0; e < args_.num_experts; ++e) {
      int32_t& best = best_of[args_.group_of[e]];
      if (best < 0 || scores[e] > scores[best] || (scores[best] != scores[best] && scores[e] == scores[e])) {
        best = e;
      }
    }
    Best leaders(args_.max_groups);
    for (int64_t g = 0; g < args_.num_groups; ++g) {
      if (best_of[g] >= 0) leaders.offer(scores[best_of[g]], best_of[g]);
    }
    bool open[kMaxExperts] = {};
    for (int64_t i = 0; i < leaders.size(); ++i) open[args_.group_of[leaders.id(i)]] = true;
    int64_t found = 0;
    for (int64_t i = 0; i < args_.list_length && (i < args_.top_t || found < args_.top_k - 1); ++i) {
      if (!open[args_.group_of[list[i]]]) continue;
      partners.offer(scores[list[i]], list[i]);
      ++found;
    }
  }

  void weigh(const float* logits, const int64_t* ids, float* weights) const {
    const int64_t top_k = args_.top_k;
    if (args_.score == Score::kSoftmaxOfChosen) {
      float largest = kLeast;
      for (int64_t k = 0; k < top_k; ++k) largest = std::max(largest, logits[ids[k]]);
      for (int64_t k = 0; k < top_k; ++k) weights[k] = exp_of(logits[ids[k]] - largest);
    } else {
      for (int64_t k = 0; k < top_k; ++k) weights[k] = probabilities_[ids[k]];
    }
    float sum = 0.0f;
    for (int64_t k = 0; k < top_k; ++k) sum += weights[k];
    const bool divide = args_.renormalise || args_.score == Score::kSoftmaxOfChosen;
    const float divisor = divide ? sum + kTiny : 1.0f;
    for (int64_t k = 0; k < top_k; ++k) weights[k] = weights[k] / divisor * args_.scale;
  }

  static constexpr float kTiny = 1e-20f;  // all K sigmoids may be zero

  const ChooseExpertsArgs& args_;
  std::vector<float> scores_, probabilities_;  // [num_experts]
};

EP_VECTORISED void choose(const ChooseExpertsArgs& args, int64_t begin, int64_t end) {
  Chooser chooser(args);
  for (int64_t token = begin; token < end; ++token) chooser.choose(token);
}

}  // namespace

void choose_experts_cpu(const ChooseExpertsArgs& args, int64_t begin, int64_t end) {
  choose(args, begin, end);
}

}  // namespace ep
