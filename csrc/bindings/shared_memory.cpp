// Torch side of shared_memory: check, call. Results are 8 * peer + status, 0 when all went well.
#include "shared_memory.h"

#include <vector>

#include "tensor.h"

namespace ep {
namespace {

int64_t as_number(const SharedResult& result) {
  return result.status == SharedStatus::kDone ? 0 : 8 * result.peer + static_cast<int64_t>(result.status);
}

// The arenas as mapped here, first bytes of each.
class Mapped {
 public:
  Mapped(const std::vector<Tensor>& arenas, const Tensor& process, int64_t rank, double timeout_s) {
    const auto num_ranks = static_cast<int64_t>(arenas.size());
    STD_TORCH_CHECK(num_ranks >= 1 && num_ranks <= kMaxSharers && rank >= 0 && rank < num_ranks,
                    "shared_memory: there may be ",
                    kMaxSharers,
                    " ranks, got rank ",
                    rank,
                    " of ",
                    num_ranks);
    for (const Tensor& arena : arenas) {
      STD_TORCH_CHECK(arena.scalar_type() == ScalarType::Byte && arena.numel() >= kSharedControlBytes,
                      "shared_memory: an arena must be uint8 and hold its control block");
      controls_.push_back(static_cast<SharedControl*>(arena.mutable_data_ptr()));
    }
    sharers_ = {.controls = controls_.data(),
                .process = data<int32_t>(process, "process", num_ranks, process),
                .num_ranks = static_cast<int>(num_ranks),
                .rank = static_cast<int>(rank),
                .timeout_s = timeout_s};
  }

  const Sharers& sharers() const { return sharers_; }

 private:
  std::vector<SharedControl*> controls_;
  Sharers sharers_{};
};

int64_t shared_memory_open(std::vector<Tensor> arenas,
                           const Tensor& process,
                           int64_t rank,
                           double timeout_s,
                           int64_t number,
                           const Tensor& place,
                           const Tensor& expected,
                           const Tensor& sending,
                           const Tensor& destination) {
  const Mapped mapped(arenas, process, rank, timeout_s);
  const auto num_ranks = static_cast<int64_t>(arenas.size());
  return as_number(shared_open(mapped.sharers(),
                               static_cast<uint32_t>(number),
                               data<int64_t>(place, "place", num_ranks, process),
                               data<int64_t>(expected, "expected", num_ranks, process),
                               data<int64_t>(sending, "sending", num_ranks, process),
                               data<int64_t>(destination, "destination", num_ranks, process)));
}

int64_t shared_memory_close(
    std::vector<Tensor> arenas, const Tensor& process, int64_t rank, double timeout_s, int64_t number) {
  const Mapped mapped(arenas, process, rank, timeout_s);
  return as_number(shared_close(mapped.sharers(), static_cast<uint32_t>(number)));
}

int64_t shared_memory_counts(std::vector<Tensor> arenas,
                             const Tensor& process,
                             int64_t rank,
                             double timeout_s,
                             int64_t number,
                             const Tensor& counts,
                             const Tensor& received) {
  const Mapped mapped(arenas, process, rank, timeout_s);
  const auto num_ranks = static_cast<int64_t>(arenas.size());
  STD_TORCH_CHECK(counts.dim() == 2 && counts.size(1) <= kMaxSharedRuns,
                  "shared_memory: counts must be a matrix of at most ",
                  kMaxSharedRuns,
                  " columns");
  const int64_t num_runs = counts.size(1);
  return as_number(shared_counts(mapped.sharers(),
                                 static_cast<uint32_t>(number),
                                 data<int32_t>(counts, "counts", num_ranks * num_runs, process),
                                 static_cast<int>(num_runs),
                                 data<int32_t>(received, "received", num_ranks * num_runs, process)));
}

void shared_memory_fail(std::vector<Tensor> arenas, const Tensor& process, int64_t rank) {
  shared_fail(Mapped(arenas, process, rank, 0.0).sharers());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ep_engine, CPU, m) {
  m.impl("shared_memory_open", TORCH_BOX(&shared_memory_open));
  m.impl("shared_memory_close", TORCH_BOX(&shared_memory_close));
  m.impl("shared_memory_counts", TORCH_BOX(&shared_memory_counts));
  m.impl("shared_memory_fail", TORCH_BOX(&shared_memory_fail));
}

}  // namespace ep
