// Torch side of checksum: check, call.
#include "checksum.h"

#include <atomic>

#include "tensor.h"

namespace ep {
namespace {

int64_t checksum(
    const Tensor& elements, int64_t columns, int64_t first, int64_t row_step, int64_t column_step) {
  STD_TORCH_CHECK(elements.is_contiguous() && columns >= 1,
                  "checksum: elements must be contiguous, in rows of at least one, got rows of ",
                  columns);
  const ChecksumArgs args{.elements = elements.mutable_data_ptr(),
                          .element_size = static_cast<int64_t>(elements.element_size()),
                          .columns = columns,
                          .first = first,
                          .row_step = row_step,
                          .column_step = column_step};
  std::atomic<uint64_t> sum{0};
  in_parallel(
      elements.numel(), 0, [&](int64_t begin, int64_t end) { sum += checksum_cpu(args, begin, end); });
  return static_cast<int64_t>(sum.load());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) { m.impl("checksum", TORCH_BOX(&checksum)); }

}  // namespace ep
