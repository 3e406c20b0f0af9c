// How a CPU op that goes in phases gets its threads, without torch.
#pragma once

#include <cstdint>
#include <functional>

namespace ep {

using Range = std::function<void(int64_t begin, int64_t end)>;

// Calls `range` on parts of [0, count) that cover it, side by side, and returns when all are done.
using ParallelFor = std::function<void(int64_t count, const Range& range)>;

}  // namespace ep
