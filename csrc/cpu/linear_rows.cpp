#include "linear_rows.h"

#include "vectorise.h"

namespace ep {
namespace {

// Sixteen running sums, so that vectors do them; the order of additions is fixed.
float dot(const float* a, const float* b, int64_t dim) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[d + lane] * b[d + lane];
  }
  for (; d < dim; ++d) lanes[d % kLanes] += a[d] * b[d];
  float sum = 0.0f;
  for (const float lane : lanes) sum += lane;
  return sum;
}

EP_VECTORISED void multiply(const LinearRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t n = 0; n < args.outer; ++n) {
      args.out[t * args.outer + n] = dot(args.x + t * args.inner, args.w + n * args.inner, args.inner);
    }
  }
}

}  // namespace

void linear_rows_cpu(const LinearRowsArgs& args, int64_t begin, int64_t end) { multiply(args, begin, end); }

}  // namespace ep
