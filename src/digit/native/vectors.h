// Vectors as wide as the processor's registers, which GCC and Clang make the best of on any processor.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;  // 32 registers of 64 bytes
#elif defined(__AVX2__)
#define DIGIT_AVX2
constexpr int LANES = 8;  // 16 registers of 32 bytes
#else
constexpr int LANES = 4;  // 16 bytes: SSE, NEON
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));  // bfloat16

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// LANES numbers in float32, from float32 or bfloat16.
inline floats widened(const float* from) { return load<floats>(from); }
inline floats widened(const uint16_t* from) {
#if defined(DIGIT_AVX2)
    return (floats)((ints)_mm256_cvtepu16_epi32((__m128i)load<halves>(from)) << 16);
#else
    return (floats)(__builtin_convertvector(load<halves>(from), ints) << 16);
#endif
}

// And back: to the nearest bfloat16, ties to even.
inline void narrow(floats v, float* to) { store(to, v); }
inline void narrow(floats v, uint16_t* to) {
    const ints bits = (ints)v;
    store(to, __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves));
}

// e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (the Cephes library's coefficients); 0 below float32's range.
inline floats exponential(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;
    const floats t = x * 1.44269504f;
    const ints n = __builtin_convertvector(t + (t < 0.0f ? floats{} - 0.5f : floats{} + 0.5f), ints);
    const floats whole = __builtin_convertvector(n, floats);
    const floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (floats)((n + 127) << 23);
}

}  // namespace
