#include "fp8_rows.h"

#include <algorithm>

#include "vectorise.h"

namespace ep {
namespace {

// e4m3: 1 sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7f is NaN, there is no infinity.
constexpr float kLargest = 448.0f;
constexpr float kLeastNormal = 0x1p-6f, kSubnormalUnit = 0x1p-9f;
constexpr uint32_t kLargestBits = 0x7e, kNanBits = 0x7f;
constexpr int kMantissaShift = 20;                    // mantissa bits that a float has more
constexpr uint32_t kBiasDifference = (127 - 7) << 3;  // in units of the last mantissa bit
constexpr float kRound = 12582912.0f;                 // 1.5 * 2^23: adding it rounds to an integer

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// To nearest even; too large becomes the largest.
uint8_t encode(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
  const uint32_t rounded = (size + 0x7ffff + (size >> kMantissaShift & 1)) >> kMantissaShift;
  const uint32_t normal = rounded - kBiasDifference;
  const uint32_t subnormal = bits_of(float_of(size) / kSubnormalUnit + kRound) - bits_of(kRound);
  uint32_t code = float_of(size) < kLeastNormal ? subnormal : normal > kLargestBits ? kLargestBits : normal;
  code = size > 0x7f800000 ? kNanBits : code;
  return static_cast<uint8_t>(sign | code);
}

float decode(uint8_t code) {
  const uint32_t size = code & 0x7f, sign = (code & 0x80u) << 24;
  const float normal = float_of((size + kBiasDifference) << kMantissaShift);
  const float magnitude = size < 8 ? static_cast<float>(size) * kSubnormalUnit : normal;
  return float_of((size == kNanBits ? 0x7fc00000 : bits_of(magnitude)) | sign);
}

template <typename T>
void quantise(const QuantiseRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (args.row[n] < 0) continue;
    const T* x = static_cast<const T*>(args.x) + args.row[n] * args.x_stride;
    uint8_t* values = args.values + n * args.values_stride;
    for (int64_t first = 0; first < args.dim; first += kFp8Block) {
      const int64_t last = std::min(args.dim, first + kFp8Block);
      uint32_t largest = 0;  // as bits, which order like the magnitudes and keep a NaN
      for (int64_t d = first; d < last; ++d) {
        const uint32_t size = bits_of(to_float(x[d])) & 0x7fffffff;
        largest = size > largest ? size : largest;
      }
      const float quotient = float_of(largest) / kLargest;
      const float scale = quotient == 0.0f ? 1.0f : quotient;  // also where it is too small for a float
      for (int64_t d = first; d < last; ++d) values[d] = encode(to_float(x[d]) / scale);
      args.scales[n * args.scales_stride + first / kFp8Block] = scale;
    }
  }
}

template <typename T>
void dequantise(const DequantiseRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* values = args.values + n * args.values_stride;
    T* out = static_cast<T*>(args.out) + n * args.dim;
    for (int64_t first = 0; first < args.dim; first += kFp8Block) {
      const int64_t last = std::min(args.dim, first + kFp8Block);
      const float scale = args.scales[n * args.scales_stride + first / kFp8Block];
      for (int64_t d = first; d < last; ++d) out[d] = from_float<T>(decode(values[d]) * scale);
    }
  }
}

EP_VECTORISED void quantise_float(const QuantiseRowsArgs& args, int64_t begin, int64_t end) {
  quantise<float>(args, begin, end);
}

EP_VECTORISED void quantise_bfloat16(const QuantiseRowsArgs& args, int64_t begin, int64_t end) {
  quantise<BFloat16>(args, begin, end);
}

EP_VECTORISED void dequantise_float(const DequantiseRowsArgs& args, int64_t begin, int64_t end) {
  dequantise<float>(args, begin, end);
}

EP_VECTORISED void dequantise_bfloat16(const DequantiseRowsArgs& args, int64_t begin, int64_t end) {
  dequantise<BFloat16>(args, begin, end);
}

}  // namespace

void quantise_rows_cpu(const QuantiseRowsArgs& args, int64_t begin, int64_t end) {
  (args.type == ElementType::kFloat32 ? quantise_float : quantise_bfloat16)(args, begin, end);
}

void dequantise_rows_cpu(const DequantiseRowsArgs& args, int64_t begin, int64_t end) {
  (args.type == ElementType::kFloat32 ? dequantise_float : dequantise_bfloat16)(args, begin, end);
}

}  // namespace ep
