#include "gather_rows.h"

#include <vector>

#include "vectorise.h"

namespace ep {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

void write(void* out, const void* row, int64_t bytes, bool streaming) {
  if (streaming) {
    stream_bytes(out, row, bytes);
  } else {
    std::memcpy(out, row, bytes);
  }
}

template <typename T>
void gather(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  std::vector<T> scaled(args.weight == nullptr ? 0 : args.dim);
  for (int64_t n = begin; n < end; ++n) {
    if (n + 1 < end && args.row[n + 1] >= 0) {  // fetched meanwhile, because rows lie anywhere
      const T* next = static_cast<const T*>(args.x) + args.row[n + 1] * args.x_stride;
      for (int64_t d = 0; d < args.dim; d += kLine / sizeof(T)) __builtin_prefetch(next + d);
    }
    if (args.row[n] < 0) continue;
    const T* row = static_cast<const T*>(args.x) + args.row[n] * args.x_stride;
    T* out = static_cast<T*>(args.out) + n * args.out_stride;
    if (args.weight != nullptr) {
      const float weight = args.weight[n];
      T* product = scaled.data();
      for (int64_t d = 0; d < args.dim; ++d) product[d] = from_float<T>(weight * to_float(row[d]));
      row = product;
    }
    write(out, row, args.dim * sizeof(T), args.streaming);
  }
  finish_stream();
}

EP_VECTORISED void gather_float(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  gather<float>(args, begin, end);
}

EP_VECTORISED void gather_bfloat16(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  gather<BFloat16>(args, begin, end);
}

}  // namespace

void gather_rows_cpu(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  (args.type == ElementType::kFloat32 ? gather_float : gather_bfloat16)(args, begin, end);
}

}  // namespace ep
