// Weights as the products read them: in panels of 32 outputs, see products.cpp.
//
// All three forms are made alike, of units of 32 bits: 16 outputs' 16 next units are turned, and
// become 16 pieces of a panel. Of float32 a unit is a number, of bfloat16 those of outputs i and
// i + 16, of 8-bit integers four numbers of one output.

#include "kernels.h"
#include "simd.h"

namespace {

constexpr long PANEL = 32;

// Turns what `row` gives for each of 16 outputs, and stores it `stride` units apart.
template <class Row>
void turn(int32_t* to, long stride, long count, Row row) {
    Float16x rows[16];
    UNROLLED
    for (int i = 0; i < 16; i++) rows[i] = _mm512_castsi512_ps(row(i));
    transpose(rows);
    for (long k = 0; k < count; k++)
        _mm512_storeu_si512(to + k * stride, _mm512_castps_si512(rows[k]));
}

// Calls `work(panel)` for each panel of a weight with so many outputs.
template <class Work>
void for_panels(long outputs, Work work) {
    const long panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads)
    for (long panel = 0; panel < panels; panel++) work(panel);
}

Int16x widened(const uint16_t* from, Mask lanes) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
}

Float16x numbers(const float* from, Mask lanes) { return load(from, lanes); }

Float16x numbers(const uint16_t* from, Mask lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(widened(from, lanes), 16));
}

// Each output's largest magnitude becomes 127; gives the scale, which is no number if one is not.
template <class Number>
float quantize(const Number* weight, int8_t* values, long inputs) {
    const Int16x magnitude = _mm512_set1_epi32(0x7fffffff);
    Int16x most = _mm512_setzero_si512();
    for (long k = 0; k < inputs; k += LANES) {
        const Int16x bits = _mm512_castps_si512(numbers(weight + k, first_lanes(inputs - k)));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    const int bits = _mm512_reduce_max_epi32(most);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const float scale = (largest < 0x1p-100f ? 0x1p-100f : largest) / 127.0f;
    for (long k = 0; k < inputs; k += LANES) {
        const Mask lanes = first_lanes(inputs - k);
        const Float16x value = _mm512_div_ps(numbers(weight + k, lanes), all(scale));
        _mm512_mask_cvtepi32_storeu_epi8(values + k, lanes, _mm512_cvtps_epi32(value));
    }
    return scale;
}

}  // namespace

extern "C" {

void pack_float(const float* weight, float* panels, long inputs, long outputs) {
    for_panels(outputs, [&](long panel) {
        auto* to = reinterpret_cast<int32_t*>(panels + panel * inputs * PANEL);
        for (long k = 0; k < inputs; k += LANES)
            for (long half = 0; half < PANEL; half += LANES)
                turn(to + k * PANEL + half, PANEL, std::min<long>(LANES, inputs - k), [&](int i) {
                    const long output = panel * PANEL + half + i;
                    if (output >= outputs) return _mm512_setzero_si512();
                    const float* from = weight + output * inputs + k;
                    return _mm512_castps_si512(load(from, first_lanes(inputs - k)));
                });
    });
}

void pack_brain(const uint16_t* weight, uint16_t* panels, long inputs, long outputs) {
    for_panels(outputs, [&](long panel) {
        auto* to = reinterpret_cast<int32_t*>(panels + panel * inputs * PANEL);
        for (long k = 0; k < inputs; k += LANES) {
            const Mask lanes = first_lanes(inputs - k);
            const auto part = [&](long output) {
                if (output >= outputs) return _mm512_setzero_si512();
                return widened(weight + output * inputs + k, lanes);
            };
            turn(to + k * LANES, LANES, std::min<long>(LANES, inputs - k), [&](int i) {
                const long output = panel * PANEL + i;
                const Int16x upper = _mm512_slli_epi32(part(output + LANES), 16);
                return _mm512_or_si512(part(output), upper);
            });
        }
    });
}

// Also gives for each output -128 times its sum.
void pack_int8(const int8_t* weight, int8_t* panels, int32_t* start, long inputs, long outputs) {
    const long terms = (inputs + 3) / 4 * 4;
    for_panels(outputs, [&](long panel) {
        auto* to = reinterpret_cast<int32_t*>(panels + panel * terms * PANEL);
        for (long k = 0; k < terms; k += 4 * LANES) {
            const long left = inputs - k;
            const __mmask64 bytes = left >= 64 ? ~0ull : (1ull << left) - 1;
            for (long half = 0; half < PANEL; half += LANES)
                turn(to + k / 4 * PANEL + half, PANEL, std::min<long>(LANES, (terms - k) / 4),
                     [&](int i) {
                         const long output = panel * PANEL + half + i;
                         if (output >= outputs) return _mm512_setzero_si512();
                         return _mm512_maskz_loadu_epi8(bytes, weight + output * inputs + k);
                     });
        }
        for (long n = 0; n < PANEL; n++) {
            const long output = panel * PANEL + n;
            int32_t sum = 0;
            for (long k = 0; output < outputs && k < inputs; k++) sum += weight[output * inputs + k];
            start[output] = -128 * sum;
        }
    });
}

// [outputs, inputs] of 32 bits or bfloat16 to 8-bit integers, and a scale for each output.
void quantize_int8(const void* weight, int is_brain, int8_t* values, float* scales, long inputs,
                   long outputs) {
#pragma omp parallel for num_threads(threads)
    for (long output = 0; output < outputs; output++) {
        const long at = output * inputs;
        scales[output] =
            is_brain ? quantize(static_cast<const uint16_t*>(weight) + at, values + at, inputs)
                     : quantize(static_cast<const float*>(weight) + at, values + at, inputs);
    }
}

}  // extern "C"
