#include "linear_rows.h"

#include "dot.h"

namespace ep {

void linear_rows_cpu(const LinearRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t n = 0; n < args.outer; ++n) {
      args.out[t * args.outer + n] = dot(args.x + t * args.inner, args.w + n * args.inner, args.inner);
    }
  }
}

}  // namespace ep
