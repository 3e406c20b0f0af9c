// How CPU ops reach the machine's vectors without being compiled for one machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

// A function with this mark is compiled for several vector widths, with all that it calls inlined, and the
// widest that the processor has is chosen when the library is loaded. Contraction is off for the whole build,
// so every width gives the same bits. The sanitizers cannot start such functions.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__)
#define EP_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default"), flatten))
// The same for products of 64-bit integers, which AVX-512 has only in a later part.
#define EP_VECTORISED_INTEGERS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"), flatten))
#else
#define EP_VECTORISED
#define EP_VECTORISED_INTEGERS
#endif

namespace ep {

// Bit i: whether values[i] >= least, for 64 values; false for NaN.
inline uint64_t bits_of_64_at_least(const float* values, float least) {
  uint64_t bits = 0;
#if defined(__x86_64__)
  const auto compare = [&](int i) {
    return _mm_castps_si128(_mm_cmpge_ps(_mm_loadu_ps(values + i), _mm_set1_ps(least)));
  };
  for (int i = 0; i < 64; i += 16) {  // four times four answers, packed to a byte each
    const __m128i low = _mm_packs_epi32(compare(i), compare(i + 4));
    const __m128i high = _mm_packs_epi32(compare(i + 8), compare(i + 12));
    bits |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high))) << i;
  }
#else
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(values[i] >= least) << i;
#endif
  return bits;
}

// memcpy past the caches, for bytes that this core will not read again: no line of the destination is read
// first. `finish_stream` must be called before another thread is told of them.
inline void stream_bytes(void* to, const void* from, int64_t count) {
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
  constexpr int64_t kPack = sizeof(__m128i);
  auto* out = static_cast<char*>(to);
  const auto* in = static_cast<const char*>(from);
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kPack);
  const int64_t head = misaligned == 0 ? 0 : kPack - misaligned;
  if (head > 0 && head <= count) {
    std::memcpy(out, in, head);
    out += head;
    in += head;
    count -= head;
  } else if (head > 0) {
    std::memcpy(out, in, count);
    return;
  }
  int64_t done = 0;
  for (; done + 4 * kPack <= count; done += 4 * kPack) {  // a cache line at a time
    __m128i packs[4];
    std::memcpy(packs, in + done, sizeof(packs));
    for (int i = 0; i < 4; ++i)
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + done + i * kPack), packs[i]);
  }
  std::memcpy(out + done, in + done, count - done);
#else
  std::memcpy(to, from, count);
#endif
}

inline void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace ep
