#include "gather_rows.h"

#include <cstddef>

namespace ep {
namespace {

template <typename T>
void scale_rows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (args.row[n] < 0) continue;
    const T* x = static_cast<const T*>(args.x) + args.row[n] * args.dim;
    T* out = static_cast<T*>(args.out) + n * args.dim;
    const float weight = args.weight[n];
    for (int64_t d = 0; d < args.dim; ++d) out[d] = from_float<T>(weight * to_float(x[d]));
  }
}

void copy_rows(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  const int64_t row_bytes = args.dim * (args.type == ElementType::kFloat32 ? 4 : 2);
  const auto* x = static_cast<const std::byte*>(args.x);
  auto* out = static_cast<std::byte*>(args.out);
  for (int64_t n = begin; n < end; ++n) {
    if (args.row[n] >= 0) std::memcpy(out + n * row_bytes, x + args.row[n] * row_bytes, row_bytes);
  }
}

}  // namespace

void gather_rows_cpu(const GatherRowsArgs& args, int64_t begin, int64_t end) {
  if (args.weight == nullptr) {
    copy_rows(args, begin, end);
  } else if (args.type == ElementType::kFloat32) {
    scale_rows<float>(args, begin, end);
  } else {
    scale_rows<BFloat16>(args, begin, end);
  }
}

}  // namespace ep
