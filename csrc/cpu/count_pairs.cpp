#include "count_pairs.h"

namespace ep {

void count_pairs_cpu(const CountPairsArgs& args) {
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    const int64_t* ids = args.expert_ids + token * args.top_k;
    for (int64_t a = 0; a < args.top_k; ++a) {
      for (int64_t b = 0; b < args.top_k; ++b) {
        if (ids[a] >= 0 && ids[b] >= 0) ++args.counts[ids[a] * args.num_experts + ids[b]];
      }
    }
  }
}

}  // namespace ep
