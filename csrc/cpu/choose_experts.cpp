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

constexpr int64_t kLanes = 16;  // tokens whose best experts are found side by side

// The best experts of kLanes tokens by `scores`, [num_experts, kLanes]: experts are taken one after the other
// and sink into a sorted list, all lanes in step, so there is no branch to mispredict. Ascending ids and a
// strict comparison let the lower id win. Scores that are not above -infinity leave -1.
template <int64_t kSize>
void best_of_lanes(const float* scores, int64_t num_experts, int32_t (*ids)[kLanes]) {
  float best[kSize][kLanes];
  for (int64_t k = 0; k < kSize; ++k) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      best[k][lane] = kLeast;
      ids[k][lane] = -1;
    }
  }
  for (int32_t e = 0; e < num_experts; ++e) {
    float score[kLanes];
    int32_t id[kLanes], sinking[kLanes] = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      score[lane] = scores[e * kLanes + lane];
      id[lane] = e;
    }
    for (int64_t k = 0; k < kSize; ++k) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        // What was displaced once goes on sinking: it is better than all that is below, by score or by id.
        sinking[lane] = sinking[lane] | (score[lane] > best[k][lane] ? 1 : 0);
        const float above = sinking[lane] ? score[lane] : best[k][lane];
        const int32_t id_above = sinking[lane] ? id[lane] : ids[k][lane];
        score[lane] = sinking[lane] ? best[k][lane] : score[lane];
        id[lane] = sinking[lane] ? ids[k][lane] : id[lane];
        best[k][lane] = above;
        ids[k][lane] = id_above;
      }
    }
  }
}

// For the usual numbers of choices; false for others. Not by a pointer, so that it becomes vector code with
// what calls it.
inline bool find_best(int64_t size, const float* scores, int64_t num_experts, int32_t (*ids)[kLanes]) {
  switch (size) {
    case 1:
      best_of_lanes<1>(scores, num_experts, ids);
      return true;
    case 2:
      best_of_lanes<2>(scores, num_experts, ids);
      return true;
    case 3:
      best_of_lanes<3>(scores, num_experts, ids);
      return true;
    case 4:
      best_of_lanes<4>(scores, num_experts, ids);
      return true;
    case 5:
      best_of_lanes<5>(scores, num_experts, ids);
      return true;
    case 6:
      best_of_lanes<6>(scores, num_experts, ids);
      return true;
    case 7:
      best_of_lanes<7>(scores, num_experts, ids);
      return true;
    case 8:
      best_of_lanes<8>(scores, num_experts, ids);
      return true;
    default:
      return false;
  }
}

// What one thread needs for one token after the other.
class Chooser {
 public:
  explicit Chooser(const ChooseExpertsArgs& args)
      : args_(args),
        scores_(padded(args.num_experts)),
        probabilities_(padded(args.num_experts)),
        lanes_(args.num_experts * kLanes),
        allowed_(args.num_experts) {
    const bool listed = args.rule == Rule::kC2R || args.rule == Rule::kC2RGrouped;
    rest_ = args.top_k - listed;
    has_lanes_ = args.bias == nullptr && (listed || args.rule == Rule::kTopK) && rest_ >= 1 && rest_ <= 8;
  }

  // Whether kLanes tokens can be chosen for together.
  bool has_lanes() const { return has_lanes_; }

  void choose_lanes(int64_t token) {
    const int64_t num = args_.num_experts;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float* logits = args_.logits + (token + lane) * num;
      for (int64_t e = 0; e < num; ++e) lanes_[e * kLanes + lane] = logits[e];
    }
    int32_t first[1][kLanes], found[kMaxChoices][kLanes];
    const bool listed = args_.rule != Rule::kTopK;
    if (listed) {
      best_of_lanes<1>(lanes_.data(), num, first);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (first[0][lane] >= 0) close_others(args_.logits + (token + lane) * num, first[0][lane], lane);
      }
    }
    find_best(rest_, lanes_.data(), num, found);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (found[rest_ - 1][lane] < 0 || (listed && first[0][lane] < 0)) {  // too few scores above -infinity
        choose(token + lane);
        continue;
      }
      int64_t* ids = args_.ids + (token + lane) * args_.top_k;
      if (listed) ids[0] = first[0][lane];
      for (int64_t k = 0; k < rest_; ++k) ids[k + listed] = found[k][lane];
      const float* logits = args_.logits + (token + lane) * num;
      if (args_.score != Score::kSoftmaxOfChosen) score(logits);
      weigh(logits, ids, args_.weights + (token + lane) * args_.top_k);
    }
  }

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

  // Leaves in a lane only the scores of the experts that may go with the top-1 expert `first`.
  void close_others(const float* logits, int32_t first, int64_t lane) {
    const int32_t* list = args_.lists + first * args_.list_length;
    std::fill_n(allowed_.data(), args_.num_experts, 0);
    if (args_.rule == Rule::kC2R) {
      for (int64_t i = 0; i < args_.top_t; ++i) allowed_[list[i]] = 1;
    } else {
      for_each_inside_groups(logits, list, [&](int32_t e) { allowed_[e] = 1; });
    }
    for (int64_t e = 0; e < args_.num_experts; ++e) {
      float& score = lanes_[e * kLanes + lane];
      score = allowed_[e] ? score : kLeast;
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
      for_each_inside_groups(scores, list, [&](int32_t e) { partners.offer(scores[e], e); });
    }
    for (int64_t k = 1; k < args_.top_k; ++k) ids[k] = partners.id(k - 1);
  }

  // The first distinct groups met in score order are those whose best experts are best.
  template <typename Visit>
  void for_each_inside_groups(const float* scores, const int32_t* list, Visit visit) const {
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
      visit(list[i]);
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
  std::vector<float> lanes_;                   // [num_experts, kLanes], the scores of kLanes tokens
  std::vector<uint8_t> allowed_;               // [num_experts]
  int64_t rest_;                               // choices after the one that the rule puts first
  bool has_lanes_;
};

EP_VECTORISED void choose(const ChooseExpertsArgs& args, int64_t begin, int64_t end) {
  Chooser chooser(args);
  int64_t token = begin;
  if (chooser.has_lanes()) {
    for (; token + kLanes <= end; token += kLanes) chooser.choose_lanes(token);
  }
  for (; token < end; ++token) chooser.choose(token);
}

}  // namespace

void choose_experts_cpu(const ChooseExpertsArgs& args, int64_t begin, int64_t end) {
  choose(args, begin, end);
}

}  // namespace ep
