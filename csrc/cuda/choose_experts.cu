// One warp chooses the experts of one token. Scores are kept as keys that order as the rule wants it: the
// score, and of equals the lower id; the best is found by a reduction over the lanes, K times. Keys of a
// token lie in shared memory that only its warp touches, so the warp's own barrier is enough.
#include <algorithm>

#include "choose_experts.h"
#include "warp.cuh"

namespace ep {
namespace {

using Key = unsigned long long;
constexpr Key kClosed = 0;                   // not to be chosen, or chosen already
constexpr int64_t kSharedBytes = 48 * 1024;  // what a block gets without asking for more
constexpr int kMaxWarps = 4;

// Orders like (score, -id), NaN below all numbers; never kClosed. The addition turns -0 into 0, its equal.
__device__ Key key_of(float score, int32_t id) {
  const unsigned bits = __float_as_uint(__fadd_rn(score, 0.0f));
  const unsigned ordered = score != score ? 0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(id));
}

__device__ int32_t id_of(Key key) { return static_cast<int32_t>(0xffffffffu - static_cast<unsigned>(key)); }

__device__ float score_of(Key key) {
  const auto ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ Key best_of(const Key* keys, int64_t begin, int64_t end) {
  Key best = kClosed;
  for (int64_t e = begin + threadIdx.x; e < end; e += kWarpSize) best = keys[e] > best ? keys[e] : best;
  return warp_max(best);
}

// The shared memory of one warp, and what it does with it. All lanes call every function together.
struct Token {
  const ChooseExpertsArgs& args;
  const float* logits;  // [num_experts]
  Key* keys;            // [num_experts]
  Key* groups;          // [num_experts], the best of each group
  uint8_t* open;        // [num_experts]
  uint8_t* open_group;  // [num_experts]
  Softmax softmax;      // over all, where scores are needed and come from it

  static __host__ __device__ int64_t bytes(int64_t num_experts) {
    const int64_t flags = (2 * num_experts + 7) / 8 * 8;
    return 2 * num_experts * static_cast<int64_t>(sizeof(Key)) + flags;
  }

  template <typename Body>
  __device__ void for_each(int64_t count, Body body) const {
    for (int64_t i = threadIdx.x; i < count; i += kWarpSize) body(i);
    __syncwarp();
  }

  // Else by the logits, which order experts as the scores do: scores may round two of them together.
  __device__ bool chosen_by_score() const {
    return args.bias != nullptr || (args.rule == Rule::kGroupLimited && args.group_top > 1);
  }

  __device__ void prepare_softmax() {
    const bool needed =
        args.score == Score::kSoftmax || (args.score == Score::kSoftmaxOfChosen && chosen_by_score());
    if (needed) softmax = warp_softmax(logits, args.num_experts);
  }

  __device__ float probability(int64_t e) const {
    if (args.score == Score::kLogit) return logits[e];
    return args.score == Score::kSigmoid ? sigmoid_of(logits[e]) : softmax.of(logits[e]);
  }

  __device__ void make_keys() const {
    const bool by_score = chosen_by_score();
    for_each(args.num_experts, [&](int64_t e) {
      float score = by_score ? probability(e) : logits[e];
      if (args.bias != nullptr) score += args.bias[e];
      keys[e] = key_of(score, static_cast<int32_t>(e));
    });
  }

  // Takes the best key out.
  __device__ int32_t take(Key* from, int64_t count) const {
    const int32_t id = id_of(best_of(from, 0, count));
    __syncwarp();  // all have read
    if (threadIdx.x == 0) from[id] = kClosed;
    __syncwarp();
    return id;
  }

  // Opens the `max_groups` best groups.
  __device__ void open_groups() const {
    for_each(args.num_groups, [&](int64_t g) { open_group[g] = 0; });
    for (int64_t i = 0; i < args.max_groups; ++i) {
      const int32_t g = take(groups, args.num_groups);
      if (threadIdx.x == 0) open_group[g] = 1;
      __syncwarp();
    }
  }

  // Groups are runs of ids, scored by the sum of their best.
  __device__ void keep_best_groups() const {
    const int64_t size = args.num_experts / args.num_groups;
    for (int64_t g = 0; g < args.num_groups; ++g) {
      float total = 0.0f;
      Key below = ~kClosed;
      for (int64_t i = 0; i < min(args.group_top, size); ++i) {
        Key best = kClosed;
        for (int64_t e = g * size + threadIdx.x; e < (g + 1) * size; e += kWarpSize) {
          best = keys[e] < below && keys[e] > best ? keys[e] : best;
        }
        below = warp_max(best);
        total += score_of(below);
      }
      if (threadIdx.x == 0) groups[g] = key_of(total, static_cast<int32_t>(g));
    }
    __syncwarp();
    open_groups();
    for_each(args.num_experts, [&](int64_t e) {
      if (!open_group[e / size]) keys[e] = kClosed;
    });
  }

  // Leaves the collaborators of `first` that the rule allows.
  __device__ void keep_collaborators(int32_t first) const {
    const int32_t* list = args.lists + first * args.list_length;
    const bool grouped = args.rule == Rule::kC2RGrouped;
    if (grouped) open_first_groups(first);
    for_each(args.num_experts, [&](int64_t e) { open[e] = 0; });
    for_each(args.top_t, [&](int64_t i) { open[list[i]] = !grouped || open_group[args.group_of[list[i]]]; });
    if (grouped) follow_list(list);
    for_each(args.num_experts, [&](int64_t e) {
      if (!open[e]) keys[e] = kClosed;
    });
  }

  // The first distinct groups met in score order are those whose best experts are best. `first` has been
  // taken out of the keys, so its group is opened by its own key. Integer maxima are the same in any order.
  __device__ void open_first_groups(int32_t first) const {
    for_each(args.num_groups, [&](int64_t g) { groups[g] = kClosed; });
    for_each(args.num_experts,
             [&](int64_t e) { atomicMax(&groups[args.group_of[e]], e == first ? ~kClosed : keys[e]); });
    for_each(args.num_groups, [&](int64_t g) { open_group[g] = 0; });
    for (int64_t i = 0; i < args.max_groups; ++i) {
      const Key best = best_of(groups, 0, args.num_groups);
      if (best == kClosed) break;
      const int32_t g = args.group_of[best == ~kClosed ? first : id_of(best)];
      __syncwarp();
      if (threadIdx.x == 0) {
        groups[g] = kClosed;
        open_group[g] = 1;
      }
      __syncwarp();
    }
  }

  // Opens more of the list inside the open groups until there are K - 1. An entry is open if fewer than that
  // stand before it, which lanes see in each other's votes.
  __device__ void follow_list(const int32_t* list) const {
    int found = 0;
    for (int64_t first = 0; first < args.list_length && found < args.top_k - 1; first += kWarpSize) {
      const int64_t i = first + threadIdx.x;
      const bool inside = i < args.list_length && open_group[args.group_of[list[i]]];
      const unsigned votes = __ballot_sync(kAllLanes, inside);
      const int before = found + __popc(votes & ((1u << threadIdx.x) - 1));
      if (inside && before < args.top_k - 1) open[list[i]] = 1;
      found += __popc(votes);
    }
    __syncwarp();
  }

  // Lane k gets the k-th id.
  __device__ int32_t select() const {
    int32_t mine = 0;
    int64_t k = 0;
    make_keys();
    if (args.rule == Rule::kGroupLimited) keep_best_groups();
    if (args.rule == Rule::kC2R || args.rule == Rule::kC2RGrouped) {
      const int32_t first = take(keys, args.num_experts);
      if (threadIdx.x == 0) mine = first;
      if (args.top_k > 1) keep_collaborators(first);
      k = 1;
    }
    for (; k < args.top_k; ++k) {
      const int32_t id = take(keys, args.num_experts);
      if (threadIdx.x == k) mine = id;
    }
    return mine;
  }

  // The weight of lane k's expert.
  __device__ float weigh(int32_t id) const {
    constexpr float kTiny = 1e-20f;  // all K sigmoids may be zero
    const bool chosen = threadIdx.x < args.top_k;
    float weight = 0.0f;
    if (args.score == Score::kSoftmaxOfChosen) {
      const float most = warp_max(chosen ? logits[id] : -INFINITY);
      weight = chosen ? expf(logits[id] - most) : 0.0f;
    } else if (chosen) {
      weight = probability(id);
    }
    const float total = warp_sum(weight);
    const bool divide = args.renormalise || args.score == Score::kSoftmaxOfChosen;
    return weight / (divide ? total + kTiny : 1.0f) * args.scale;
  }
};

// One warp chooses for one token, lane k writes its k-th choice. Warps share nothing, hence no block-wide
// synchronisation; see Token for that of a warp.
//
// Block (kWarpSize, warps); grid ceil(num_tokens / warps); shared memory Token::bytes for each warp.
__global__ void choose_experts_kernel(const ChooseExpertsArgs args) {
  extern __shared__ Key memory[];
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (t >= args.num_tokens) return;

  const int64_t num = args.num_experts;
  Key* keys = memory + threadIdx.y * (Token::bytes(num) / static_cast<int64_t>(sizeof(Key)));
  auto* flags = reinterpret_cast<uint8_t*>(keys + 2 * num);
  Token token{args, args.logits + t * num, keys, keys + num, flags, flags + num, {}};
  token.prepare_softmax();
  const bool chosen = threadIdx.x < args.top_k;
  const int64_t place = t * args.top_k + threadIdx.x;
  int32_t id = 0;
  if (args.rule != Rule::kGiven) {
    id = token.select();
    if (chosen) args.ids[place] = id;
  } else if (chosen) {
    id = static_cast<int32_t>(args.ids[place]);
  }
  const float weight = token.weigh(id);
  if (chosen) args.weights[place] = weight;
}

}  // namespace

cudaError_t choose_experts_cuda(const ChooseExpertsArgs& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return cudaSuccess;  // an empty grid is a launch error

  const int64_t bytes = Token::bytes(args.num_experts);
  const int64_t warps = std::clamp<int64_t>(kSharedBytes / bytes, 1, kMaxWarps);
  const auto grid = static_cast<unsigned>((args.num_tokens + warps - 1) / warps);
  const dim3 block(kWarpSize, static_cast<unsigned>(warps));
  choose_experts_kernel<<<grid, block, static_cast<size_t>(warps * bytes), stream>>>(args);
  return cudaGetLastError();
}

}  // namespace ep
