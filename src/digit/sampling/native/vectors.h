// Vectors of 16 numbers, which GCC and Clang make the best of on any processor.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float floats __attribute__((vector_size(64)));  // 16 lanes
typedef int32_t ints __attribute__((vector_size(64)));  // 16 lanes

constexpr int LANES = 16;

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
