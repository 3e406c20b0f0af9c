// exp as plain arithmetic, so that loops over it become vector code with the same bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>

namespace ep {

// Within 2 units in the last place of exp(x), NaN for NaN. Arguments are taken to -87.3 .. 88.7, which keeps
// the result a normal number: 1.2e-38 stands for all that is smaller.
//
// exp(x) = 2^n exp(r), n the integer nearest to x / ln 2, |r| <= ln 2 / 2. ln 2 is subtracted in two parts,
// the first with so few bits that n times it is exact; exp(r) is a polynomial (the one of the Cephes
// library).
inline float exp_of(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  constexpr float kLeast = -87.3f, kLargest = 88.7f;
  const float above = x < kLeast ? kLeast : x, within = above > kLargest ? kLargest : above;
  const float n = (within * kLog2E + kRound) - kRound;
  const float r = (within - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n by adding n to the exponent. It stays that of a normal number: where n is largest p is below 1, where
  // it is least p is above. NaN has n = 0 or the least integer, of which the shift leaves nothing.
  uint32_t bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits += static_cast<uint32_t>(static_cast<int32_t>(n)) << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

}  // namespace ep
