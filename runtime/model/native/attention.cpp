// Attention over the paged KV cache, in one fixed order of additions.
//
// A row's keys are taken in chunks of 128 from the first token on. Within a chunk a score is one
// chain over the head's dimensions; weights are relative to the greatest score so far (online
// softmax: Milakov and Gimelshein, arXiv:1805.02867); the output is one chain over the keys. Which
// rows share the work decides nothing of this, so a row has the same bits in a prompt of any
// chunking, alone, and among drafts.
//
// The work is cut into units: some tokens of one sequence, and one head of keys with all heads of
// queries that share it. A unit lays 32 keys out as columns and multiplies all its rows with them.

#include <limits>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace {

constexpr long KEYS = 128;      // of a chunk
constexpr long TILE_KEYS = 32;  // laid out as columns at once
constexpr long ROWS_MAX = 64;   // of a unit, if a token has no more
constexpr long ROWS = 28;       // as many as fit: laying keys out is a small part then
constexpr long WIDTH_MAX = 256;
constexpr int SCORE_ROWS = 14;   // of a tile of scores: 28 vectors of sums
constexpr int OUTPUT_ROWS = 6;   // of a tile of outputs: with 4 vectors each, 24
constexpr int OUTPUT_WIDTH = 4;  // vectors

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Some tokens of a span, and one head of keys.
struct Unit {
    long span, first, tokens, key_head;
};

// The cache, as what its numbers are.
template <class Number>
struct Stored {
    const Number *keys, *values;
    const float *key_scales, *value_scales;
};

// What a thread needs for a unit; aligned, and small enough for its own cache.
struct Room {
    alignas(64) float query[ROWS_MAX * WIDTH_MAX];
    alignas(64) float output[ROWS_MAX * WIDTH_MAX];
    alignas(64) float scores[ROWS_MAX * KEYS];
    alignas(64) float columns[WIDTH_MAX * TILE_KEYS];
    alignas(64) float key_scales[KEYS];
    alignas(64) float value_scales[KEYS];
    float peak[ROWS_MAX];
    float total[ROWS_MAX];
    int64_t places[KEYS];  // of a chunk's keys, in slots and heads
};

template <int ROWS>
void score_tile(const float* query, const float* columns, float* scores, long width) {
    Float16x sums[ROWS][2];
    UNROLLED
    for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (long d = 0; d < width; d++) {
        const Float16x low = load(columns + d * TILE_KEYS);
        const Float16x high = load(columns + d * TILE_KEYS + LANES);
        UNROLLED
        for (int i = 0; i < ROWS; i++) {
            const Float16x x = all(query[i * width + d]);
            sums[i][0] = _mm512_fmadd_ps(x, low, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(x, high, sums[i][1]);
        }
    }
    UNROLLED
    for (int i = 0; i < ROWS; i++) {
        store(scores + i * KEYS, sums[i][0]);
        store(scores + i * KEYS + LANES, sums[i][1]);
    }
}

template <class Number, int ROWS, int VECTORS>
void output_tile(const float* weights, const Number* values, const int64_t* places, float* output,
                 long width, long keys) {
    Float16x sums[ROWS][VECTORS];
    UNROLLED
    for (int i = 0; i < ROWS; i++) {
        UNROLLED
        for (int v = 0; v < VECTORS; v++) sums[i][v] = load(output + i * width + v * LANES);
    }
    for (long key = 0; key < keys; key++) {
        const Number* at = values + places[key] * width;
        Float16x value[VECTORS];
        UNROLLED
        for (int v = 0; v < VECTORS; v++) value[v] = load(at + v * LANES);
        UNROLLED
        for (int i = 0; i < ROWS; i++) {
            const Float16x weight = all(weights[i * KEYS + key]);
            UNROLLED
            for (int v = 0; v < VECTORS; v++)
                sums[i][v] = _mm512_fmadd_ps(weight, value[v], sums[i][v]);
        }
    }
    UNROLLED
    for (int i = 0; i < ROWS; i++) {
        UNROLLED
        for (int v = 0; v < VECTORS; v++) store(output + i * width + v * LANES, sums[i][v]);
    }
}

// Calls `work` with `count`, at most MAX, as a constant.
template <int MAX, class Work>
void with_constant(long count, Work work) {
    if constexpr (MAX > 0) {
        if (count == MAX) return work(std::integral_constant<int, MAX>{});
        with_constant<MAX - 1>(count, work);
    }
}

// Of up to 16 keys, as rows, `width` numbers each to columns; a key that is not there is zero.
template <class Number>
void lay_out(const Number* keys, const int64_t* places, long count, long width, float* columns) {
    for (long d = 0; d < width; d += LANES) {
        Float16x rows[16];
        UNROLLED
        for (int i = 0; i < 16; i++)
            rows[i] = i < count ? load(keys + places[i] * width + d) : _mm512_setzero_ps();
        transpose(rows);
        UNROLLED
        for (int i = 0; i < 16; i++) store(columns + (d + i) * TILE_KEYS, rows[i]);
    }
}

// Scores of a chunk's keys for rows from `first_row` on; earlier ones see none of them.
template <class Number>
void score_chunk(Room& room, const Stored<Number>& cache, const Heads& form, long first_row,
                 long rows, long keys) {
    for (long tile = 0; tile < keys; tile += TILE_KEYS) {
        for (long half = 0; half < TILE_KEYS; half += LANES)
            lay_out(cache.keys, room.places + tile + half, keys - tile - half, form.width,
                    room.columns + half);
        for (long row = first_row; row < rows; row += SCORE_ROWS)
            with_constant<SCORE_ROWS>(std::min<long>(SCORE_ROWS, rows - row), [&](auto count) {
                score_tile<count>(room.query + row * form.width, room.columns,
                                  room.scores + row * KEYS + tile, form.width);
            });
    }
}

// One row's scores to weights; what it had before is put relative to its new peak.
void weigh(Room& room, long row, long seen, long keys, long width, bool is_scaled) {
    float* scores = room.scores + row * KEYS;
    Float16x most = all(NOTHING);
    for (long key = 0; key < seen; key += LANES) {
        Float16x score = load(scores + key);
        if (is_scaled) score = _mm512_mul_ps(score, load(room.key_scales + key));
        store(scores + key, score);
        most = _mm512_mask_max_ps(most, first_lanes(seen - key), most, score);
    }
    const float peak = std::max(room.peak[row], _mm512_reduce_max_ps(most));
    Float16x sums = _mm512_setzero_ps();
    for (long key = 0; key < keys; key += LANES) {
        // A score so far below adds nothing, and its power would be a denormal number.
        Float16x score = _mm512_sub_ps(load(scores + key), all(peak));
        score = _mm512_max_ps(all(-80.0f), score);
        const Mask lanes = first_lanes(seen - key);
        Float16x weight = _mm512_maskz_mov_ps(lanes, exponential(score));
        sums = _mm512_add_ps(sums, weight);
        if (is_scaled) weight = _mm512_mul_ps(weight, load(room.value_scales + key));
        store(scores + key, weight);
    }
    if (room.peak[row] != peak) {
        const float before = std::max(room.peak[row] - peak, -80.0f);
        const float factor = _mm512_cvtss_f32(exponential(all(before)));
        room.total[row] *= factor;
        for (long d = 0; d < width; d += LANES) {
            float* at = room.output + row * width + d;
            store(at, _mm512_mul_ps(load(at), all(factor)));
        }
        room.peak[row] = peak;
    }
    room.total[row] += sum_of(sums);
}

template <class Number>
void add_values(Room& room, const Stored<Number>& cache, const Heads& form, long first_row,
                long rows, long keys) {
    for (long row = first_row; row < rows; row += OUTPUT_ROWS)
        for (long d = 0; d < form.width; d += OUTPUT_WIDTH * LANES) {
            const long vectors = std::min<long>(OUTPUT_WIDTH, (form.width - d) / LANES);
            with_constant<OUTPUT_ROWS>(std::min<long>(OUTPUT_ROWS, rows - row), [&](auto count) {
                with_constant<OUTPUT_WIDTH>(vectors, [&](auto wide) {
                    output_tile<Number, count, wide>(
                        room.scores + row * KEYS, cache.values + d, room.places,
                        room.output + row * form.width + d, form.width, keys);
                });
            });
        }
}

template <class Number>
void attend_unit(Room& room, const float* heads, float* output, const Stored<Number>& cache,
                 const Spans& spans, const Unit& unit, const Heads& form) {
    const Span& span = spans.spans[unit.span];
    const int64_t* table = spans.tables + span.table;
    const long group = form.queries / form.keys, width = form.width;
    const long rows = unit.tokens * group;
    const long stride = (form.queries + 2 * form.keys) * width;
    for (long row = 0; row < rows; row++) {
        const float* at = heads + (span.row + unit.first + row / group) * stride +
                          (unit.key_head * group + row % group) * width;
        for (long d = 0; d < width; d += LANES) {
            store(room.query + row * width + d, _mm512_mul_ps(load(at + d), all(form.scale)));
            store(room.output + row * width + d, _mm512_setzero_ps());
        }
        room.peak[row] = NOTHING;
        room.total[row] = 0.0f;
    }
    const long seen_first = span.position + unit.first + 1;  // by the first token
    const long seen_last = seen_first + unit.tokens - 1;
    const bool is_scaled = cache.key_scales != nullptr;
    for (long start = 0; start < seen_last; start += KEYS) {
        const long keys = std::min(KEYS, seen_last - start);
        for (long key = 0; key < keys; key++) {
            const long position = start + key;
            const long slot = table[position / spans.block_size] * spans.block_size +
                              position % spans.block_size;
            room.places[key] = slot * form.keys + unit.key_head;
            if (is_scaled) {
                room.key_scales[key] = cache.key_scales[room.places[key]];
                room.value_scales[key] = cache.value_scales[room.places[key]];
            }
        }
        // Tokens before this one see nothing of the chunk.
        const long first_row = std::max(0L, start + 1 - seen_first) * group;
        score_chunk(room, cache, form, first_row, rows, keys);
        for (long row = first_row; row < rows; row++) {
            const long seen = std::min(keys, seen_first + row / group - start);
            weigh(room, row, seen, keys, width, is_scaled);
        }
        add_values(room, cache, form, first_row, rows, keys);
    }
    for (long row = 0; row < rows; row++) {
        float* to = output + ((span.row + unit.first + row / group) * form.queries +
                              unit.key_head * group + row % group) * width;
        const Float16x total = all(room.total[row]);
        for (long d = 0; d < width; d += LANES)
            store(to + d, _mm512_div_ps(load(room.output + row * width + d), total));
    }
}

std::vector<Unit> units_of(const Spans& spans, const Heads& form) {
    const long tokens_max = std::max(1L, ROWS * form.keys / form.queries);
    std::vector<Unit> units;
    for (long index = 0; index < spans.count; index++)
        for (long first = 0; first < spans.spans[index].tokens; first += tokens_max)
            for (long head = 0; head < form.keys; head++) {
                const long left = spans.spans[index].tokens - first;
                units.push_back({index, first, std::min(tokens_max, left), head});
            }
    return units;
}

template <class Number>
void attend_as(const float* heads, float* output, const Heads& form, const Spans& spans,
               const Cache& cache) {
    const Stored<Number> stored{static_cast<const Number*>(cache.keys),
                                static_cast<const Number*>(cache.values), cache.key_scales,
                                cache.value_scales};
    const std::vector<Unit> units = units_of(spans, form);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t index = 0; index < units.size(); index++) {
        thread_local Room room;
        attend_unit(room, heads, output, stored, spans, units[index], form);
    }
}

}  // namespace

extern "C" {

// Rows of padding are left as they are.
void attend(const float* heads, float* output, const Heads* form, const Spans* spans,
            const Cache* cache) {
    if (form->is_narrow)
        attend_as<int8_t>(heads, output, *form, *spans, *cache);
    else
        attend_as<float>(heads, output, *form, *spans, *cache);
}

}  // extern "C"
