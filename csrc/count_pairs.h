// count_pairs: how often two experts serve the same token (arXiv:2504.01337, expert collaboration).
//
// counts[i, j] grows by one for every token that chose both i and j, i != j; counts[i, i] for every token
// that chose i. A choice below 0 is none.
#pragma once

#include <cstdint>

#ifdef EP_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ep {

struct CountPairsArgs {
  const int64_t* expert_ids;  // [num_tokens, top_k], distinct within a token
  int64_t num_tokens;         // may be 0
  int64_t top_k;
  int64_t num_experts;
  int64_t* counts;  // [num_experts, num_experts], added to
};

void count_pairs_cpu(const CountPairsArgs& args);

#ifdef EP_WITH_CUDA
// Asynchronous on `stream`. Returns the launch status; never prints, never exits.
cudaError_t count_pairs_cuda(const CountPairsArgs& args, cudaStream_t stream);
#endif

}  // namespace ep
