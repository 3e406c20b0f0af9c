#include "choose_experts.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "exp.h"
#include "vectorise.h"

namespace ep {
namespace {

constexpr int64_t kBlock = 16;  // scores that are looked at together
constexpr float kLeast = -__builtin_inff();

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

// Four tokens are chosen for side by side, one in each lane of what all processors have vectors for: such
// code does not hang on the optimiser. Loops over longer arrays are left to it.
constexpr int64_t kLanes = 4;
using Pack = float __attribute__((vector_size(kLanes * sizeof(float))));
using IdPack = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr int64_t kColumns = 4;      // packs that a row of scores is folded into
constexpr int64_t kMostInLanes = 8;  // choices that can be found side by side
constexpr int64_t kWord = 64;        // scores that are compared with a threshold together

template <typename Wanted, typename Element>
Wanted load(const Element* from) {
  Wanted pack;
  std::memcpy(&pack, from, sizeof(pack));
  return pack;
}

// Element `lane` of part `column` of every row.
Pack across(const Pack (*rows)[kColumns], int64_t column, int64_t lane) {
  return Pack{rows[0][column][lane], rows[1][column][lane], rows[2][column][lane], rows[3][column][lane]};
}

// The best scores met by each lane and their ids, the best first. Ids must come in ascending order: a strict
// comparison then lets the lower one win. Where a score goes is decided at all places at once, as the list is
// sorted: there is no branch to mispredict and no chain of comparisons.
class BestOfLanes {
 public:
  BestOfLanes() {
    std::fill_n(scores_, kMostInLanes, Pack{} + kLeast);
    std::fill_n(ids_, kMostInLanes, IdPack{} - 1);
  }

  void offer(Pack score, IdPack id) {
    for (int64_t k = kMostInLanes - 1; k > 0; --k) {
      const IdPack above = score > scores_[k - 1], here = score > scores_[k];
      ids_[k] = above ? ids_[k - 1] : here ? id : ids_[k];
      scores_[k] = above ? scores_[k - 1] : here ? score : scores_[k];
    }
    ids_[0] = score > scores_[0] ? id : ids_[0];
    scores_[0] = score > scores_[0] ? score : scores_[0];
  }

  Pack score(int64_t k) const { return scores_[k]; }
  IdPack id(int64_t k) const { return ids_[k]; }  // -1 if so many are not above -infinity

 private:
  Pack scores_[kMostInLanes];
  IdPack ids_[kMostInLanes];
};

// What one thread needs for one token after the other.
class Chooser {
 public:
  explicit Chooser(const ChooseExpertsArgs& args)
      : args_(args),
        scores_(args.num_experts),
        probabilities_(args.num_experts),
        listed_(args.rule == Rule::kC2R || args.rule == Rule::kC2RGrouped),
        rest_(args.top_k - listed_),
        width_((args.num_experts + kWord - 1) / kWord * kWord) {
    if (!has_lanes()) return;
    rows_.assign(kLanes * width_, kLeast);
    candidates_.resize(kLanes * width_);
    candidate_ids_.resize(kLanes * width_);
    if (!listed_) return;
    closed_ = std::make_unique_for_overwrite<float[]>(args.num_experts * args.num_experts);
    is_known_.assign(args.num_experts, false);
  }

  // Whether kLanes tokens can be chosen for together.
  bool has_lanes() const {
    return args_.bias == nullptr && (listed_ || args_.rule == Rule::kTopK) && rest_ >= 1 &&
           rest_ <= kMostInLanes;
  }

  void choose_lanes(int64_t token) {
    Pack scores[kMostInLanes + 1];
    IdPack ids[kMostInLanes + 1];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      std::copy_n(args_.logits + (token + lane) * args_.num_experts, args_.num_experts, row(lane));
    }
    BestOfLanes columns = largest_columns();
    if (listed_) {
      scores[0] = columns.score(0);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        ids[0][lane] = first_of(row(lane), scores[0][lane]);
        if (ids[0][lane] >= 0) close_others(row(lane), ids[0][lane]);
      }
      columns = largest_columns();
    }
    const int64_t count = collect(columns.score(rest_ - 1));
    BestOfLanes best;
    for (int64_t i = 0; i < count * kLanes; i += kLanes) {
      best.offer(load<Pack>(&candidates_[i]), load<IdPack>(&candidate_ids_[i]));
    }
    for (int64_t k = 0; k < rest_; ++k) {
      scores[k + listed_] = best.score(k);
      ids[k + listed_] = best.id(k);
    }
    weigh_lanes(token, scores, ids);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (ids[0][lane] < 0 || ids[args_.top_k - 1][lane] < 0) choose(token + lane);  // too few are numbers
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
  float* row(int64_t lane) { return rows_.data() + lane * width_; }

  // The largest score of each of kColumns * kLanes columns that scores are folded into.
  static void fold(const float* scores, int64_t count, Pack* most) {
    std::fill_n(most, kColumns, Pack{} + kLeast);
    int64_t e = 0;
    for (; e + kColumns * kLanes <= count; e += kColumns * kLanes) {
      for (int64_t i = 0; i < kColumns; ++i) {
        const auto score = load<Pack>(scores + e + i * kLanes);
        most[i] = score > most[i] ? score : most[i];
      }
    }
    for (; e < count; ++e) most[0][0] = std::max(most[0][0], scores[e]);
  }

  // The largest columns of each row. The K-th is a threshold: at least K scores reach it, so the K best do,
  // and hardly any others.
  BestOfLanes largest_columns() {
    Pack most[kLanes][kColumns];
    BestOfLanes best;
    for (int64_t lane = 0; lane < kLanes; ++lane) fold(row(lane), width_, most[lane]);
    for (int64_t i = 0; i < kColumns * kLanes; ++i)
      best.offer(across(most, i / kLanes, i % kLanes), IdPack{});
    return best;
  }

  // The lowest id of the largest score, -1 if that is no number.
  int32_t first_of(const float* scores, float largest) const {
    for (int64_t e = 0; largest > kLeast; e += kWord) {
      const uint64_t found = bits_of_64_at_least(scores + e, largest);
      if (found != 0) return static_cast<int32_t>(e + std::countr_zero(found));
    }
    return -1;
  }

  // Leaves only the scores of the experts that may go with the top-1 expert `first`.
  void close_others(float* scores, int32_t first) {
    const int64_t num = args_.num_experts;
    const int32_t* list = args_.lists + first * args_.list_length;
    float* __restrict closed = closed_.get() + first * num;
    if (!is_known_[first]) {
      std::fill_n(closed, num, kLeast);
      const auto open = [&](int32_t e) { closed[e] = 0.0f; };
      if (args_.rule == Rule::kC2R) {
        std::for_each_n(list, args_.top_t, open);
        is_known_[first] = true;
      } else {
        for_each_inside_groups(scores, list, open);
      }
    }
    for (int64_t e = 0; e < num; ++e) scores[e] += closed[e];
  }

  // Writes each lane's scores that reach its threshold, by ascending id, then -infinity; returns how many.
  int64_t collect(Pack threshold) {
    int64_t counts[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float* scores = row(lane);
      const float least = std::max(threshold[lane], std::numeric_limits<float>::lowest());
      int64_t at = lane;
      for (int64_t e = 0; e < width_; e += kWord) {
        for (uint64_t found = bits_of_64_at_least(scores + e, least); found != 0; found &= found - 1) {
          const int64_t id = e + std::countr_zero(found);
          candidates_[at] = scores[id];
          candidate_ids_[at] = static_cast<int32_t>(id);
          at += kLanes;
        }
      }
      counts[lane] = at / kLanes;
    }
    const int64_t most = *std::max_element(counts, counts + kLanes);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int64_t i = counts[lane]; i < most; ++i) candidates_[i * kLanes + lane] = kLeast;
    }
    return most;
  }

  // What `weigh` does, in the same order, for kLanes tokens.
  void weigh_lanes(int64_t token, const Pack* scores, const IdPack* ids) {
    const int64_t top_k = args_.top_k;
    Pack weights[kMostInLanes + 1], sums = Pack{} + 1.0f, total{};
    if (args_.score == Score::kSoftmax) {
      Pack parts[kLanes][kColumns];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        exps(args_.logits + (token + lane) * args_.num_experts, scores[0][lane], parts[lane]);
      }
      sums = Pack{};
      for (int64_t i = 0; i < kColumns * kLanes; ++i) sums += across(parts, i / kLanes, i % kLanes);
    }
    float x[(kMostInLanes + 1) * kLanes];
    const bool sigmoid = args_.score == Score::kSigmoid, logit = args_.score == Score::kLogit;
    for (int64_t k = 0; k < top_k; ++k) {
      const Pack given = sigmoid || logit ? scores[k] : scores[k] - scores[0];
      std::memcpy(x + k * kLanes, &given, sizeof(given));
    }
    if (!logit) {
      for (int64_t i = 0; i < top_k * kLanes; ++i) x[i] = sigmoid ? sigmoid_of(x[i]) : exp_of(x[i]);
    }
    for (int64_t k = 0; k < top_k; ++k) total += weights[k] = load<Pack>(x + k * kLanes) / sums;
    const Pack divisors = divides() ? total + kTiny : Pack{} + 1.0f;
    for (int64_t k = 0; k < top_k; ++k) {
      weights[k] = weights[k] / divisors * args_.scale;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        args_.ids[(token + lane) * top_k + k] = ids[k][lane];
        args_.weights[(token + lane) * top_k + k] = weights[k][lane];
      }
    }
  }

  // exp(logit - largest) of every expert, and its sums by columns, which are to be added up in their order.
  void exps(const float* logits, float largest, Pack* sums) {
    float* __restrict out = probabilities_.data();
    const int64_t num = args_.num_experts;
    for (int64_t e = 0; e < num; ++e) out[e] = exp_of(logits[e] - largest);
    std::fill_n(sums, kColumns, Pack{});
    int64_t e = 0;
    for (; e + kColumns * kLanes <= num; e += kColumns * kLanes) {
      for (int64_t i = 0; i < kColumns; ++i) sums[i] += load<Pack>(out + e + i * kLanes);
    }
    for (; e < num; ++e) sums[0][0] += out[e];
  }

  void score(const float* logits) {
    const int64_t num = args_.num_experts;
    float* __restrict out = probabilities_.data();
    if (args_.score == Score::kSigmoid) {
      for (int64_t e = 0; e < num; ++e) out[e] = sigmoid_of(logits[e]);
      return;
    }
    if (args_.score == Score::kLogit) {
      std::copy_n(logits, num, out);
      return;
    }
    Pack most[kColumns], sums[kColumns];
    float largest = kLeast, sum = 0.0f;
    fold(logits, num, most);
    for (int64_t i = 0; i < kColumns * kLanes; ++i) largest = std::max(largest, most[i / kLanes][i % kLanes]);
    exps(logits, largest, sums);
    for (int64_t i = 0; i < kColumns * kLanes; ++i) sum += sums[i / kLanes][i % kLanes];
    for (int64_t e = 0; e < num; ++e) out[e] /= sum;
  }

  // Whether the weights of a token are divided by their sum.
  bool divides() const { return args_.renormalise || args_.score == Score::kSoftmaxOfChosen; }

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
    const float divisor = divides() ? sum + kTiny : 1.0f;
    for (int64_t k = 0; k < top_k; ++k) weights[k] = weights[k] / divisor * args_.scale;
  }

  static constexpr float kTiny = 1e-20f;  // all K sigmoids may be zero

  const ChooseExpertsArgs& args_;
  std::vector<float> scores_, probabilities_;  // [num_experts]
  bool listed_;                                // the rule puts one expert first and has lists for the others
  int64_t rest_;                               // choices after the one that the rule puts first
  int64_t width_;                              // num_experts, rounded up to whole words
  std::vector<float> rows_;                    // [kLanes, width], the scores, -infinity where none is
  std::vector<float> candidates_;              // [width, kLanes], the scores that reach the threshold
  std::vector<int32_t> candidate_ids_;         // [width, kLanes]
  std::unique_ptr<float[]> closed_;            // [num_experts, num_experts], what is added for a top-1 expert
  std::vector<bool> is_known_;                 // [num_experts], whether its row of `closed_` is made
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
