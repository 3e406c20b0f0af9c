#include "linear_rows.h"

#include <algorithm>
#include <vector>

#include "vectorise.h"

namespace ep {
namespace {

constexpr int64_t kRows = 4, kColumns = 32;  // outputs whose sums are in registers at the same time

// Columns of w side by side, kColumns at a time, zeros where there are none: [panels, inner, kColumns].
std::vector<float> packed(const LinearRowsArgs& args) {
  const int64_t panels = (args.outer + kColumns - 1) / kColumns;
  std::vector<float> result(panels * args.inner * kColumns);
  for (int64_t n = 0; n < args.outer; ++n) {
    float* panel = &result[n / kColumns * args.inner * kColumns + n % kColumns];
    for (int64_t k = 0; k < args.inner; ++k) {
      panel[k * kColumns] = args.w[k * args.w_inner_stride + n * args.w_outer_stride];
    }
  }
  return result;
}

// kNumRows rows of x times one panel. Every output is one running sum over k, so its bits do not depend on
// kNumRows.
template <int64_t kNumRows>
void multiply_panel(const float* x, int64_t inner, const float* panel, float (*sums)[kColumns]) {
  float acc[kNumRows][kColumns] = {};
  for (int64_t k = 0; k < inner; ++k) {
    for (int64_t r = 0; r < kNumRows; ++r) {
      const float factor = x[r * inner + k];
      for (int64_t c = 0; c < kColumns; ++c) acc[r][c] += factor * panel[k * kColumns + c];
    }
  }
  for (int64_t r = 0; r < kNumRows; ++r) std::copy_n(acc[r], kColumns, sums[r]);
}

EP_VECTORISED void multiply(const LinearRowsArgs& args, int64_t begin, int64_t end) {
  const std::vector<float> panels = packed(args);
  float sums[kRows][kColumns];
  for (int64_t t = begin; t < end;) {
    const int64_t rows = end - t >= kRows ? kRows : 1;
    for (int64_t n = 0; n < args.outer; n += kColumns) {
      const float* panel = &panels[n * args.inner];
      if (rows == kRows) {
        multiply_panel<kRows>(args.x + t * args.inner, args.inner, panel, sums);
      } else {
        multiply_panel<1>(args.x + t * args.inner, args.inner, panel, sums);
      }
      for (int64_t r = 0; r < rows; ++r) {
        std::copy_n(sums[r], std::min(kColumns, args.outer - n), args.out + (t + r) * args.outer + n);
      }
    }
    t += rows;
  }
}

}  // namespace

void linear_rows_cpu(const LinearRowsArgs& args, int64_t begin, int64_t end) { multiply(args, begin, end); }

}  // namespace ep
