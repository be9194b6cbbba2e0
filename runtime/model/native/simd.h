// What all kernels share: vectors of 16 numbers, and how they are read, written and summed.
//
// Every operation here is one that IEEE 754 defines, in an order that the source gives: no
// contraction, no reassociation. So the bits are the same whatever compiler or processor.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

using Float16x = __m512;   // 16 numbers of 32 bits
using Int16x = __m512i;    // the same, as integers
using Mask = __mmask16;

constexpr int LANES = 16;

// For loops over arrays that are to stay in registers.
#define UNROLLED _Pragma("GCC unroll 32")

#define INLINED __attribute__((always_inline))  // goes behind the parameters of a lambda
#define INLINE inline INLINED

template <int... NUMBERS, class Work>
INLINE void for_constants(std::integer_sequence<int, NUMBERS...>, Work work) {
    (work(std::integral_constant<int, NUMBERS>{}), ...);
}

// Calls `work` with 0, 1 … N - 1 as constants. What an assembler statement changes in a loop is kept
// in memory, even if the loop is unrolled; this leaves no loop.
template <int N, class Work>
INLINE void for_each(Work work) {
    for_constants(std::make_integer_sequence<int, N>{}, work);
}

inline Mask first_lanes(long count) {
    return count >= LANES ? 0xffff : static_cast<Mask>((1u << std::max(count, 0L)) - 1);
}

inline Float16x load(const float* from) { return _mm512_loadu_ps(from); }

inline Float16x load(const float* from, Mask lanes) { return _mm512_maskz_loadu_ps(lanes, from); }

// 8-bit numbers become what they count; their scale is the caller's.
inline Float16x load(const int8_t* from) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
}

inline void store(float* to, Float16x values) { _mm512_storeu_ps(to, values); }

inline void store(float* to, Float16x values, Mask lanes) {
    _mm512_mask_storeu_ps(to, lanes, values);
}

inline Float16x all(float value) { return _mm512_set1_ps(value); }

// The sum of 16 numbers, by halves.
inline float sum_of(Float16x values) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps(values, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

// e to the power of numbers between -87 and 88.
//
// Cody and Waite's reduction to |r| <= ln(2) / 2, and Taylor's polynomial of degree 6, whose error
// there is below 2e-7 relative.
inline Float16x exponential(Float16x x) {
    const Float16x count = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 0x08);
    Float16x r = _mm512_fnmadd_ps(count, all(0.693145752f), x);
    r = _mm512_fnmadd_ps(count, all(1.42860677e-6f), r);
    Float16x y = all(1.0f / 720.0f);
    y = _mm512_fmadd_ps(y, r, all(1.0f / 120.0f));
    y = _mm512_fmadd_ps(y, r, all(1.0f / 24.0f));
    y = _mm512_fmadd_ps(y, r, all(1.0f / 6.0f));
    y = _mm512_fmadd_ps(y, r, all(0.5f));
    y = _mm512_fmadd_ps(y, r, all(1.0f));
    y = _mm512_fmadd_ps(y, r, all(1.0f));
    return _mm512_scalef_ps(y, count);
}

// Turns 16 rows of 16 numbers into columns, in place.
inline void transpose(Float16x (&rows)[16]) {
    Float16x pairs[16];
    UNROLLED
    for (int i = 0; i < 8; i++) {
        pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    // Now row 4 q + j holds column 4 l + j of rows 4 q … 4 q + 3 in its 128-bit lane l.
    UNROLLED
    for (int q = 0; q < 4; q++) {
        const __m512d a = _mm512_castps_pd(pairs[4 * q]), b = _mm512_castps_pd(pairs[4 * q + 1]);
        const __m512d c = _mm512_castps_pd(pairs[4 * q + 2]), d = _mm512_castps_pd(pairs[4 * q + 3]);
        rows[4 * q] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        rows[4 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        rows[4 * q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        rows[4 * q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
    // What is left is a transposition of 4 x 4 lanes, for each j.
    UNROLLED
    for (int j = 0; j < 4; j++) {
        const Float16x low = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0x44);
        const Float16x high = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0xee);
        const Float16x low2 = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0x44);
        const Float16x high2 = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0xee);
        pairs[j] = _mm512_shuffle_f32x4(low, low2, 0x88);
        pairs[4 + j] = _mm512_shuffle_f32x4(low, low2, 0xdd);
        pairs[8 + j] = _mm512_shuffle_f32x4(high, high2, 0x88);
        pairs[12 + j] = _mm512_shuffle_f32x4(high, high2, 0xdd);
    }
    UNROLLED
    for (int i = 0; i < 16; i++) rows[i] = pairs[i];
}
