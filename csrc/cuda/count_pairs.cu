#include <algorithm>

#include "count_pairs.h"

namespace ep {
namespace {

constexpr int kThreadsPerBlock = 256;
constexpr int64_t kSharedBytes = 48 * 1024;  // what a block gets without asking for more
constexpr int64_t kChoicesPerBlock = 2048;   // enough to pay for adding a block's own counts to all counts
constexpr int64_t kMaxBlocks = 1024;

// A thread takes one choice of a token at a time and pairs it with all choices of that token. With kOwnCounts
// a block counts in shared memory (32 bits, for fewer than 2^32 tokens) and adds that to `counts` once at the
// end; the synchronisations stand between clearing, counting and adding. Without, counts are too many for
// shared memory and are added to where they are. Integer additions give the same counts in any order.
//
// Block kThreadsPerBlock, grid-stride over choices; shared memory [num_experts, num_experts] if kOwnCounts.
template <bool kOwnCounts>
__global__ void count_pairs_kernel(const CountPairsArgs args) {
  extern __shared__ unsigned own[];
  auto* counts = reinterpret_cast<unsigned long long*>(args.counts);
  const int64_t num_pairs = args.num_experts * args.num_experts;
  if constexpr (kOwnCounts) {
    for (int64_t pair = threadIdx.x; pair < num_pairs; pair += blockDim.x) own[pair] = 0;
    __syncthreads();
  }

  const int64_t num_choices = args.num_tokens * args.top_k;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t own_first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t a = own_first; a < num_choices; a += stride) {
    const int64_t first = a / args.top_k * args.top_k;  // of the token's choices
    for (int64_t b = first; b < first + args.top_k; ++b) {
      if (args.expert_ids[a] < 0 || args.expert_ids[b] < 0) continue;
      const int64_t pair = args.expert_ids[a] * args.num_experts + args.expert_ids[b];
      if constexpr (kOwnCounts) {
        atomicAdd(&own[pair], 1u);
      } else {
        atomicAdd(&counts[pair], 1ull);
      }
    }
  }

  if constexpr (kOwnCounts) {
    __syncthreads();
    for (int64_t pair = threadIdx.x; pair < num_pairs; pair += blockDim.x) {
      if (own[pair] != 0) atomicAdd(&counts[pair], static_cast<unsigned long long>(own[pair]));
    }
  }
}

}  // namespace

cudaError_t count_pairs_cuda(const CountPairsArgs& args, cudaStream_t stream) {
  const int64_t num_choices = args.num_tokens * args.top_k;
  if (num_choices == 0) return cudaSuccess;  // an empty grid is a launch error

  const int64_t own_bytes = args.num_experts * args.num_experts * static_cast<int64_t>(sizeof(unsigned));
  if (own_bytes <= kSharedBytes) {
    const int64_t grid = std::min(kMaxBlocks, (num_choices + kChoicesPerBlock - 1) / kChoicesPerBlock);
    count_pairs_kernel<true><<<static_cast<unsigned>(grid), kThreadsPerBlock, own_bytes, stream>>>(args);
  } else {
    const int64_t grid = std::min(kMaxBlocks, (num_choices + kThreadsPerBlock - 1) / kThreadsPerBlock);
    count_pairs_kernel<false><<<static_cast<unsigned>(grid), kThreadsPerBlock, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace ep
