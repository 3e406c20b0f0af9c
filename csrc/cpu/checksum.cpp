#include "checksum.h"

#include <algorithm>

#include "vectorise.h"

namespace ep {
namespace {

inline uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Elements of one row.
template <typename T>
uint64_t sum_run(const T* elements, int64_t count, uint64_t position, uint64_t step) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += mix(static_cast<uint64_t>(static_cast<int64_t>(elements[i])) ^ mix(position + i * step));
  }
  return sum;
}

template <typename T>
uint64_t sum_rows(const ChecksumArgs& args, int64_t begin, int64_t end) {
  uint64_t sum = 0;
  while (begin < end) {
    const int64_t row = begin / args.columns, column = begin % args.columns;
    const int64_t count = std::min(end - begin, args.columns - column);
    const int64_t position = args.first + row * args.row_step + column * args.column_step;
    sum += sum_run(static_cast<const T*>(args.elements) + begin,
                   count,
                   static_cast<uint64_t>(position),
                   static_cast<uint64_t>(args.column_step));
    begin += count;
  }
  return sum;
}

EP_VECTORISED_INTEGERS uint64_t sum_of(const ChecksumArgs& args, int64_t begin, int64_t end) {
  switch (args.element_size) {
    case 1:
      return sum_rows<uint8_t>(args, begin, end);
    case 2:
      return sum_rows<int16_t>(args, begin, end);
    case 4:
      return sum_rows<int32_t>(args, begin, end);
    default:
      return sum_rows<int64_t>(args, begin, end);
  }
}

}  // namespace

uint64_t checksum_cpu(const ChecksumArgs& args, int64_t begin, int64_t end) {
  return sum_of(args, begin, end);
}

}  // namespace ep
