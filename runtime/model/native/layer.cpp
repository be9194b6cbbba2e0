// What a layer does between its products: norms, the gated activation, rotation and storing.

#include "kernels.h"
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
void keep(const float* head, float* kept, float*, long, long width) {
    std::memcpy(kept, head, width * sizeof(float));
}

void keep(const float* head, int8_t* kept, float* scales, long place, long width) {
    Float16x most = _mm512_setzero_ps();
    for (long i = 0; i < width; i += LANES)
        most = _mm512_max_ps(most, _mm512_abs_ps(load(head + i, first_lanes(width - i))));
    const float largest = std::max(_mm512_reduce_max_ps(most), 0x1p-100f);
    scales[place] = largest / 127.0f;
    const Float16x factor = all(127.0f / largest);
    for (long i = 0; i < width; i += LANES) {
        const Mask lanes = first_lanes(width - i);
        const Int16x level = _mm512_cvtps_epi32(_mm512_mul_ps(load(head + i, lanes), factor));
        _mm512_mask_cvtsepi32_storeu_epi8(kept + i, lanes, level);
    }
}

template <class Number>
void rotate_and_store_as(float* heads, const float* qk_norm, const Heads& form, const Rows& rows,
                         const Cache& cache) {
    const long width = form.width, rotated = form.queries + form.keys;
    const long stride = (rotated + form.keys) * width;
    auto *keys = static_cast<Number*>(cache.keys), *values = static_cast<Number*>(cache.values);
#pragma omp parallel for num_threads(threads) if (rows.count > 1 && rows.count * stride > MANY_NUMBERS)
    for (long row = 0; row < rows.count; row++) {
        float* at = heads + row * stride;
        const long turn = (rows.positions ? rows.positions[row] : row) * width;
        for (long head = 0; head < rotated; head++) {
            float* one = at + head * width;
            if (qk_norm) normalise(one, qk_norm + head * width, one, width, form.epsilon);
            rotate(one, rows.cosines + turn, rows.sines + turn, width);
        }
        if (row >= rows.stored) continue;
        for (long head = 0; head < form.keys; head++) {
            const long place = rows.slots[row] * form.keys + head;
            keep(at + (form.queries + head) * width, keys + place * width, cache.key_scales,
                 place, width);
            keep(at + (rotated + head) * width, values + place * width, cache.value_scales,
                 place, width);
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

// Norms, if there are any, and turns queries and keys in place; stores keys and values.
void rotate_and_store(float* heads, const float* qk_norm, const Heads* form, const Rows* rows,
                      const Cache* cache) {
    if (form->is_narrow)
        rotate_and_store_as<int8_t>(heads, qk_norm, *form, *rows, *cache);
    else
        rotate_and_store_as<float>(heads, qk_norm, *form, *rows, *cache);
}

}  // extern "C"
