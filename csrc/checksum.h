// checksum: the sum over elements of a hash of (position, bits), modulo 2^64.
//
// Because it is a sum, parts of a tensor can be hashed in any order and by anybody, and add up to the
// checksum of the whole. The hash is mix(bits ^ mix(position)) with the finaliser of splitmix64 (Steele, Lea
// and Flood, OOPSLA 2014); bits are extended by their sign, but for single bytes.
#pragma once

#include <cstdint>

namespace ep {

struct ChecksumArgs {
  const void* elements;  // contiguous
  int64_t element_size;  // bytes: 1, 2, 4 or 8
  int64_t columns;       // of a row here
  int64_t first;         // position of the first element
  int64_t row_step;      // from the position of an element to that of the one below it
  int64_t column_step;   // and to that of the one beside it; a step of 0 makes the sum blind to their order
};

// That of elements [begin, end).
uint64_t checksum_cpu(const ChecksumArgs& args, int64_t begin, int64_t end);

}  // namespace ep
