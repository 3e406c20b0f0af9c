#include "choice_weights.h"

namespace ep {

void choice_weights_cpu(const ChoiceWeightsArgs& args) {
  for (int64_t s = 0; s < args.num_rows; ++s) {
    for (int64_t w = 0; w < args.row_width; ++w) {
      const int32_t choice = args.choice[s * args.row_width + w];
      args.rows[s * args.rows_stride + w] = choice < 0 ? 0.0f : args.weights[choice];
    }
  }
}

void choice_weights_backward_cpu(const ChoiceWeightsBackwardArgs& args) {
  for (int64_t s = 0; s < args.num_rows; ++s) {
    for (int64_t w = 0; w < args.row_width; ++w) {
      const int32_t choice = args.choice[s * args.row_width + w];
      if (choice >= 0) args.grad_weights[choice] = args.grad_rows[s * args.rows_stride + w];
    }
  }
}

}  // namespace ep
