// What the sampler asks of a whole vocabulary: the likeliest token, and who may win a draw.

#include <limits>

#include "kernels.h"
#include "simd.h"

namespace {

// The natural logarithm of positive numbers, to about 1e-7 of its value or absolutely.
//
// x = 2**k * m with m in [0.75, 1.5), and log(m) = 2 * atanh((m - 1) / (m + 1)).
Float16x twice_atanh(Float16x t) {
    const Float16x square = _mm512_mul_ps(t, t);
    Float16x y = all(1.0f / 11.0f);
    y = _mm512_fmadd_ps(y, square, all(1.0f / 9.0f));
    y = _mm512_fmadd_ps(y, square, all(1.0f / 7.0f));
    y = _mm512_fmadd_ps(y, square, all(1.0f / 5.0f));
    y = _mm512_fmadd_ps(y, square, all(1.0f / 3.0f));
    y = _mm512_fmadd_ps(y, square, all(1.0f));
    return _mm512_mul_ps(_mm512_add_ps(t, t), y);
}

Float16x logarithm(Float16x x) {
    const Float16x mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const Float16x exponent = _mm512_getexp_ps(_mm512_div_ps(x, mantissa));
    const Float16x t = _mm512_div_ps(_mm512_sub_ps(mantissa, all(1.0f)),
                                     _mm512_add_ps(mantissa, all(1.0f)));
    return _mm512_fmadd_ps(exponent, all(0.69314718f), twice_atanh(t));
}

// The hash of noise.py for 8 tokens: 52 bits.
__m512i noise_bits(__m512i counters) {
    __m512i bits = _mm512_xor_si512(counters, _mm512_srli_epi64(counters, 30));
    bits = _mm512_mullo_epi64(bits, _mm512_set1_epi64(static_cast<int64_t>(0xBF58476D1CE4E5B9ull)));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi64(bits, 27));
    bits = _mm512_mullo_epi64(bits, _mm512_set1_epi64(static_cast<int64_t>(0x94D049BB133111EBull)));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi64(bits, 31));
    return _mm512_srli_epi64(bits, 12);
}

// (bits + 1/2) / 2**52 of 16 tokens, rounded to 24 bits.
Float16x uniform(__m512i low, __m512i high) {
    const __m256 first = _mm512_cvtepi64_ps(low), second = _mm512_cvtepi64_ps(high);
    const Float16x both = _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
    return _mm512_mul_ps(_mm512_add_ps(both, all(0.5f)), all(0x1p-52f));
}

// About the noise of noise.py: Gumbel's distribution, -log(-log(u)).
//
// Near 1, where the noise is large, u has too few bits; there its distance from 1 is taken.
Float16x about_gumbel(__m512i low, __m512i high) {
    const __m512i most = _mm512_set1_epi64((1ll << 52) - 1);
    const Float16x u = uniform(low, high);
    const Float16x v = uniform(_mm512_sub_epi64(most, low), _mm512_sub_epi64(most, high));
    const Float16x far = _mm512_sub_ps(_mm512_setzero_ps(), logarithm(u));
    const Float16x near = twice_atanh(_mm512_div_ps(v, _mm512_sub_ps(all(2.0f), v)));
    const Mask is_near = _mm512_cmp_ps_mask(v, all(0.5f), _CMP_LT_OQ);
    const Float16x exponential_noise = _mm512_mask_mov_ps(far, is_near, near);
    return _mm512_sub_ps(_mm512_setzero_ps(), logarithm(exponential_noise));
}

// Counters of the hash for 16 tokens from `at` on, and their noise.
Float16x noise_at(long at, __m512i key) {
    const __m512i golden = _mm512_set1_epi64(static_cast<int64_t>(0x9E3779B97F4A7C15ull));
    const __m512i eight = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_add_epi64(_mm512_set1_epi64(at), eight);
    const __m512i high = _mm512_add_epi64(low, _mm512_set1_epi64(8));
    return about_gumbel(noise_bits(_mm512_add_epi64(_mm512_mullo_epi64(low, golden), key)),
                        noise_bits(_mm512_add_epi64(_mm512_mullo_epi64(high, golden), key)));
}

// The greatest of many numbers, and the first place where it is; 0 if none is a number.
class Best {
   public:
    // 16 numbers from place `at` on.
    void meet(Float16x numbers, Mask lanes, long at) {
        const Mask greater = _mm512_mask_cmp_ps_mask(lanes, numbers, values_, _CMP_GT_OQ);
        const Int16x here = _mm512_set1_epi32(static_cast<int>(at));
        values_ = _mm512_mask_mov_ps(values_, greater, numbers);
        starts_ = _mm512_mask_mov_epi32(starts_, greater, here);
    }

    float value() const { return _mm512_reduce_max_ps(values_); }

    long place() const {
        const Int16x lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const float most = value();
        if (most == LEAST) return 0;
        const Mask winners = _mm512_cmp_ps_mask(values_, all(most), _CMP_EQ_OQ);
        return _mm512_mask_reduce_min_epi32(winners, _mm512_add_epi32(starts_, lane));
    }

   private:
    static constexpr float LEAST = -std::numeric_limits<float>::infinity();
    Float16x values_ = all(LEAST);
    Int16x starts_ = _mm512_setzero_si512();
};

// As `_Draw` in sampling.py has it.
struct Draw {
    int64_t row;
    int64_t key;
    float inverse_temperature;
};

// Tokens of a row that may win its draw, or -1 if they are more than there is room for.
int64_t contenders(const float* logits, long width, const Draw& draw, float* noisy, int64_t* ids,
                   long room) {
    const __m512i key = _mm512_set1_epi64(draw.key);
    const Float16x factor = all(draw.inverse_temperature);
    Float16x best = all(-std::numeric_limits<float>::infinity()), largest = _mm512_setzero_ps();
    for (long at = 0; at < width; at += LANES) {
        const Mask lanes = first_lanes(width - at);
        const Float16x scaled = _mm512_mul_ps(load(logits + at, lanes), factor);
        const Float16x sum = _mm512_add_ps(scaled, noise_at(at, key));
        store(noisy + at, sum, lanes);
        best = _mm512_mask_max_ps(best, lanes, best, sum);
        // What is forbidden is infinitely low, and no measure of rounding.
        const Float16x size = _mm512_abs_ps(scaled);
        const Mask finite =
            _mm512_cmp_ps_mask(size, all(std::numeric_limits<float>::max()), _CMP_LE_OQ);
        largest = _mm512_mask_max_ps(largest, finite, largest, size);
    }
    // The true best differs from what is computed here by rounding alone.
    const float margin = 1e-3f + 1e-6f * _mm512_reduce_max_ps(largest);
    const Float16x least = all(_mm512_reduce_max_ps(best) - margin);
    long count = 0;
    for (long at = 0; at < width; at += LANES) {
        const Mask lanes = first_lanes(width - at);
        Mask may = _mm512_mask_cmp_ps_mask(lanes, load(noisy + at, lanes), least, _CMP_GE_OQ);
        for (; may; may &= may - 1) {
            if (count == room) return -1;
            ids[count++] = at + __builtin_ctz(may);
        }
    }
    return count > 0 ? count : -1;
}

}  // namespace

extern "C" {

// Of each row the greatest number, NaN if there is any, and the first place where it is.
void likeliest(const float* logits, float* values, int64_t* ids, long rows, long width) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (long row = 0; row < rows; row++) {
        const float* x = logits + row * width;
        Best best;
        Mask unordered = 0;
        for (long at = 0; at < width; at += LANES) {
            const Mask lanes = first_lanes(width - at);
            const Float16x part = load(x + at, lanes);
            unordered |= _mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q);
            best.meet(part, lanes, at);
        }
        values[row] = unordered ? std::numeric_limits<float>::quiet_NaN() : best.value();
        ids[row] = best.place();
    }
}

// A token for each row, nearly as the sampler draws it: without truncation, and with nearly the noise.
void nearly_draw(const float* logits, long rows, long width, const float* inverse_temperatures,
                 const int64_t* keys, int64_t* ids) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (long row = 0; row < rows; row++) {
        const float* x = logits + row * width;
        const bool is_drawn = inverse_temperatures[row] > 0.0f;
        const Float16x factor = all(is_drawn ? inverse_temperatures[row] : 1.0f);
        const __m512i key = _mm512_set1_epi64(keys[row]);
        Best best;
        for (long at = 0; at < width; at += LANES) {
            const Mask lanes = first_lanes(width - at);
            Float16x score = _mm512_mul_ps(load(x + at, lanes), factor);
            if (is_drawn) score = _mm512_add_ps(score, noise_at(at, key));
            best.meet(score, lanes, at);
        }
        ids[row] = best.place();
    }
}

// For each draw, tokens that may win it: `ids` [draws, room] and how many there are, or -1.
void may_win(const float* logits, long width, const Draw* draws, float* noisy, int64_t* ids,
             int64_t* counts, long num_draws, long room) {
#pragma omp parallel for num_threads(threads) if (num_draws > 1)
    for (long index = 0; index < num_draws; index++) {
        const Draw& draw = draws[index];
        counts[index] = contenders(logits + draw.row * width, width, draw, noisy + index * width,
                                   ids + index * room, room);
    }
}

}  // extern "C"
