// What a layer does between its products: norms, the gated activation, rotation and storing.

#include "simd.h"

namespace {

constexpr long MANY_NUMBERS = 1 << 14;  // below this, threads take longer to wake than to work

float inverse_rms(const float* x, long width, float epsilon) {
    Float16x sums = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES) {
        const Float16x part = load(x + i, first_lanes(width - i));
        sums = _mm512_fmadd_ps(part, part, sums);
    }
    return 1.0f / __builtin_sqrtf(sum_of(sums) / static_cast<float>(width) + epsilon);
}

void normalise(const float* x, const float* weight, float* y, long width, float epsilon) {
    const Float16x factor = all(inverse_rms(x, width, epsilon));
    for (long i = 0; i < width; i += LANES) {
        const Mask lanes = first_lanes(width - i);
        const Float16x scaled = _mm512_mul_ps(load(x + i, lanes), factor);
        store(y + i, _mm512_mul_ps(scaled, load(weight + i, lanes)), lanes);
    }
}

// Turns pairs (i, i + width / 2) of one head, in place; `sines` are negative in the first half.
void rotate(float* head, const float* cosines, const float* sines, long width) {
    const long half = width / 2;
    for (long i = 0; i < half; i += LANES) {
        const Mask lanes = first_lanes(half - i);
        const Float16x low = load(head + i, lanes), high = load(head + half + i, lanes);
        const Float16x turned_low = _mm512_mul_ps(high, load(sines + i, lanes));
        const Float16x turned_high = _mm512_mul_ps(low, load(sines + half + i, lanes));
        const Float16x kept_low = _mm512_mul_ps(low, load(cosines + i, lanes));
        const Float16x kept_high = _mm512_mul_ps(high, load(cosines + half + i, lanes));
        store(head + i, _mm512_add_ps(turned_low, kept_low), lanes);
        store(head + half + i, _mm512_add_ps(turned_high, kept_high), lanes);
    }
}

// A head's numbers as they are, or as 8 bits with a scale.
void keep(const float* head, float* kept, float*, long width) {
    std::memcpy(kept, head, width * sizeof(float));
}

void keep(const float* head, int8_t* kept, float* scale, long width) {
    Float16x most = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES)
        most = _mm512_max_ps(most, _mm512_abs_ps(load(head + i, first_lanes(width - i))));
    const float largest = std::max(_mm512_reduce_max_ps(most), 0x1p-100f);
    *scale = largest / 127.0f;
    const Float16x factor = all(127.0f / largest);
    for (long i = 0; i < width; i += LANES) {
        const Mask lanes = first_lanes(width - i);
        const Int16x level = _mm512_cvtps_epi32(_mm512_mul_ps(load(head + i, lanes), factor));
        _mm512_mask_cvtsepi32_storeu_epi8(kept + i, lanes, level);
    }
}

// Where rotate_and_store finds and leaves things; as `_Heads` in layer.py has it.
struct Heads {
    long rows, stored_rows;  // rows beyond the stored ones are padding
    long heads, kv_heads, width;
    float epsilon;
};

template <class Number>
void rotate_and_store(float* rows, const float* qk_norm, const float* cosines, const float* sines,
                      const int64_t* slots, Number* keys, Number* values, float* key_scales,
                      float* value_scales, const Heads& heads) {
    const long width = heads.width, rotated = heads.heads + heads.kv_heads;
    const long stride = (rotated + heads.kv_heads) * width;
#pragma omp parallel for num_threads(threads) if (heads.rows > 1 && heads.rows * stride > MANY_NUMBERS)
    for (long row = 0; row < heads.rows; row++) {
        float* at = rows + row * stride;
        for (long head = 0; head < rotated; head++) {
            float* one = at + head * width;
            if (qk_norm) normalise(one, qk_norm + head * width, one, width, heads.epsilon);
            rotate(one, cosines + row * width, sines + row * width, width);
        }
        if (row >= heads.stored_rows) continue;
        for (long head = 0; head < heads.kv_heads; head++) {
            const long place = slots[row] * heads.kv_heads + head;
            keep(at + (heads.heads + head) * width, keys + place * width, key_scales + place,
                 width);
            keep(at + (rotated + head) * width, values + place * width, value_scales + place,
                 width);
        }
    }
}

}  // namespace

extern "C" {

// Adds `delta`, unless it is null, to `hidden`; `normed` becomes the norm of that.
void add_and_normalise(float* hidden, const float* delta, const float* weight, float* normed,
                       long rows, long width, float epsilon) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * width > MANY_NUMBERS)
    for (long row = 0; row < rows; row++) {
        float* x = hidden + row * width;
        if (delta)
            for (long i = 0; i < width; i += LANES) {
                const Mask lanes = first_lanes(width - i);
                const Float16x more = load(delta + row * width + i, lanes);
                store(x + i, _mm512_add_ps(load(x + i, lanes), more), lanes);
            }
        normalise(x, weight, normed + row * width, width, epsilon);
    }
}

// y = silu(gate) * up, of rows [gate | up].
void silu_and_multiply(const float* gate_and_up, float* y, long rows, long width) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * width > MANY_NUMBERS)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < width; i += LANES) {
            const Mask lanes = first_lanes(width - i);
            const Float16x gate = load(gate_and_up + row * 2 * width + i, lanes);
            const Float16x up = load(gate_and_up + row * 2 * width + width + i, lanes);
            // Beyond these e**-gate is not a number that counts; what is no number stays none.
            const Float16x negated = _mm512_sub_ps(_mm512_setzero_ps(), gate);
            const Float16x low = _mm512_max_ps(all(-87.0f), negated);
            const Float16x divisor =
                _mm512_add_ps(all(1.0f), exponential(_mm512_min_ps(all(88.0f), low)));
            store(y + row * width + i, _mm512_mul_ps(_mm512_div_ps(gate, divisor), up), lanes);
        }
}

// The cache's numbers have 32 bits, or 8 and a scale for each slot and head.
void rotate_and_store_float(float* rows, const float* qk_norm, const float* cosines,
                            const float* sines, const int64_t* slots, float* keys, float* values,
                            const Heads* heads) {
    rotate_and_store(rows, qk_norm, cosines, sines, slots, keys, values, keys, values, *heads);
}

void rotate_and_store_int8(float* rows, const float* qk_norm, const float* cosines,
                           const float* sines, const int64_t* slots, int8_t* keys, int8_t* values,
                           float* key_scales, float* value_scales, const Heads* heads) {
    rotate_and_store(rows, qk_norm, cosines, sines, slots, keys, values, key_scales, value_scales,
                     *heads);
}

}  // extern "C"
