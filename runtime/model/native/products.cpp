// Products of rows with weights: y[m][n] = sum over k of x[m][k] * w[n][k].
//
// A weight lies in panels of 32 outputs, k after k, so that a panel is read from front to back. Up
// to 14 rows are multiplied with a panel at once: their 28 vectors of sums, two of the weight and
// one of the row are all registers that there are.
//
// Each sum is one chain of fused multiply-adds over k = 0, 1, 2 …; how many rows there are, or
// threads, changes nothing in it. So a row's bits are its own, and exact numerics cost nothing.

#include <cstdlib>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

int threads = 1;

namespace {

constexpr long PANEL = 32;
constexpr long TILE_ROWS = 14;
constexpr long CHUNK_ROWS = 16 * TILE_ROWS;  // rows that meet a panel while it is in the cache
constexpr long BLOCK_TERMS = 512;            // terms of a sum before the next tile has its turn
constexpr long GROUP_PANELS = 8;             // that a tile meets one after the other, at most,
constexpr long GROUP_BYTES = 256 << 10;      // and what is read of them
constexpr int AHEAD = 2048;                  // bytes; a panel's next ones are fetched early

// One term of a panel's sums: two vectors.
struct Pair {
    Float16x low, high;
};

// A weight of 32 bits a number.
struct Wide {
    static constexpr long BYTES = PANEL * 4;
    static Pair term(const char* at) {
        const auto* numbers = reinterpret_cast<const float*>(at);
        return {load(numbers), load(numbers + LANES)};
    }
};

// A weight of bfloat16: outputs i and i + 16 share 32 bits, so that a shift and a mask widen them.
struct Brain {
    static constexpr long BYTES = PANEL * 2;
    static Pair term(const char* at) {
        const Int16x both = _mm512_loadu_si512(at);
        const Int16x upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(both, upper))};
    }
};

// Where a tile's rows come from and go to.
struct FloatTile {
    const float* x;
    long x_stride;
    float* y;
    long y_stride;
    const float* bias;  // of this panel, or null
    long outputs;       // of this panel
};

template <class Weight, int ROWS>
void multiply_tile(const FloatTile& tile, const char* panel, long from, long to, bool is_last) {
    const Mask low = first_lanes(tile.outputs), high = first_lanes(tile.outputs - LANES);
    Float16x sums[ROWS][2];
    UNROLLED
    for (int i = 0; i < ROWS; i++) {
        sums[i][0] = from ? load(tile.y + i * tile.y_stride, low) : _mm512_setzero_ps();
        sums[i][1] = from ? load(tile.y + i * tile.y_stride + LANES, high) : _mm512_setzero_ps();
    }
    for (long k = from; k < to; k++) {
        const char* at = panel + k * Weight::BYTES;
        _mm_prefetch(at + AHEAD, _MM_HINT_T0);
        const Pair weight = Weight::term(at);
        UNROLLED
        for (int i = 0; i < ROWS; i++) {
            const Float16x x = all(tile.x[i * tile.x_stride + k]);
            sums[i][0] = _mm512_fmadd_ps(x, weight.low, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(x, weight.high, sums[i][1]);
        }
    }
    if (is_last && tile.bias) {
        const Float16x first = load(tile.bias, low), second = load(tile.bias + LANES, high);
        UNROLLED
        for (int i = 0; i < ROWS; i++) {
            sums[i][0] = _mm512_add_ps(sums[i][0], first);
            sums[i][1] = _mm512_add_ps(sums[i][1], second);
        }
    }
    UNROLLED
    for (int i = 0; i < ROWS; i++) {
        store(tile.y + i * tile.y_stride, sums[i][0], low);
        store(tile.y + i * tile.y_stride + LANES, sums[i][1], high);
    }
}

// Where a tile's rows of integers come from and go to.
struct IntegerTile {
    const uint8_t* x;  // 128 above what they stand for
    long x_stride;
    const float* row_scales;
    float* y;
    long y_stride;
    const int32_t* start;  // what takes the 128 off again
    const float* scales;
    const float* bias;
    long outputs;
};

// The intrinsic makes compilers copy sums from register to register; this does not. Nor does it
// change a variable of the caller's, which would then have to be in memory.
INLINE Int16x add_products(Int16x sums, Int16x x, Int16x weight) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(weight));
    return sums;
}

template <int ROWS>
void multiply_integer_tile(const IntegerTile& tile, const int8_t* panel, long terms) {
    Int16x sums[ROWS][2];
    const Int16x first = _mm512_loadu_si512(tile.start);
    const Int16x second = _mm512_loadu_si512(tile.start + LANES);
    for_each<ROWS>([&](auto i) INLINED { sums[i][0] = first, sums[i][1] = second; });
    for (long k = 0; k < terms; k += 4) {
        const int8_t* at = panel + k * PANEL;
        _mm_prefetch(at + AHEAD, _MM_HINT_T0);
        _mm_prefetch(at + AHEAD + 64, _MM_HINT_T0);
        const Int16x low = _mm512_loadu_si512(at), high = _mm512_loadu_si512(at + 64);
        for_each<ROWS>([&](auto i) INLINED {
            int four;
            std::memcpy(&four, tile.x + i * tile.x_stride + k, 4);
            const Int16x x = _mm512_set1_epi32(four);
            sums[i][0] = add_products(sums[i][0], x, low);
            sums[i][1] = add_products(sums[i][1], x, high);
        });
    }
    const Mask lanes[] = {first_lanes(tile.outputs), first_lanes(tile.outputs - LANES)};
    for_each<ROWS>([&](auto i) INLINED {
        const Float16x row_scale = all(tile.row_scales[i]);
        for_each<2>([&](auto half) INLINED {
            const long at = half * LANES;
            Float16x y = _mm512_cvtepi32_ps(sums[i][half]);
            y = _mm512_mul_ps(y, load(tile.scales + at, lanes[half]));
            y = _mm512_mul_ps(y, row_scale);
            if (tile.bias) y = _mm512_add_ps(y, load(tile.bias + at, lanes[half]));
            store(tile.y + i * tile.y_stride + at, y, lanes[half]);
        });
    });
}

// Calls `multiply` with the number of rows as a constant.
template <class Multiply>
void with_rows(long rows, Multiply multiply) {
    switch (rows) {
#define ROWS_CASE(N) \
    case N: return multiply(std::integral_constant<int, N>{});
        ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5)
        ROWS_CASE(6) ROWS_CASE(7) ROWS_CASE(8) ROWS_CASE(9) ROWS_CASE(10)
        ROWS_CASE(11) ROWS_CASE(12) ROWS_CASE(13) ROWS_CASE(14)
#undef ROWS_CASE
    }
}

// Cuts `rows` into tiles of about the same size, none above 14: `tile(first, count)`.
template <class Tile>
void for_tiles(long rows, Tile tile) {
    long first = 0;
    for (long left = (rows + TILE_ROWS - 1) / TILE_ROWS; left > 0; left--) {
        const long count = (rows - first + left - 1) / left;
        tile(first, count);
        first += count;
    }
}

// Panels that are next to each other, and rows that meet them.
struct Task {
    long panel, panels, row, rows;
};

// Shares panels, and of many rows chunks of them, among threads. Of many rows, a few panels are taken
// together: what a tile adds to a row of the result is then a piece of some length, and written
// quickly. `panel_bytes` of each are read before the next tile has its turn.
template <class Work>
void for_tasks(long rows, long outputs, long panel_bytes, Work work) {
    const long panels = (outputs + PANEL - 1) / PANEL;
    const long chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    const long fitting = std::max(1L, std::min(GROUP_PANELS, GROUP_BYTES / panel_bytes));
    const long group = rows > TILE_ROWS ? fitting : 1;
    const long groups = (panels + group - 1) / group;
    const long share = std::max(1L, groups * chunks / (8L * threads));
#pragma omp parallel for num_threads(threads) schedule(dynamic, share)
    for (long task = 0; task < groups * chunks; task++) {
        const long panel = task / chunks * group, row = task % chunks * CHUNK_ROWS;
        work(Task{panel, std::min(group, panels - panel), row, std::min(CHUNK_ROWS, rows - row)});
    }
}

template <class Weight>
void float_product(const float* x, long x_stride, const Matrix& weight, float* y, long rows) {
    const long inputs = weight.inputs, outputs = weight.outputs;
    const char* panels = static_cast<const char*>(weight.panels);
    const long block_bytes = std::min(inputs, BLOCK_TERMS) * Weight::BYTES;
    for_tasks(rows, outputs, block_bytes, [&](const Task& task) {
        for (long from = 0; from < inputs; from += BLOCK_TERMS) {
            const long to = std::min(inputs, from + BLOCK_TERMS);
            for_tiles(task.rows, [&](long offset, long tile_rows) {
                const long row = task.row + offset;
                for (long panel = task.panel; panel < task.panel + task.panels; panel++) {
                    const long output = panel * PANEL;
                    const FloatTile tile{x + row * x_stride, x_stride, y + row * outputs + output,
                                         outputs, weight.bias ? weight.bias + output : nullptr,
                                         outputs - output};
                    const char* at = panels + panel * inputs * Weight::BYTES;
                    with_rows(tile_rows, [&](auto constant) {
                        multiply_tile<Weight, constant>(tile, at, from, to, to == inputs);
                    });
                }
            });
        }
    });
}

// Rows to 8 bits, 128 above what they stand for, and each row's largest magnitude.
void quantize_row(const float* x, long inputs, long terms, uint8_t* levels, float& largest) {
    // As integers, so that what is no number is the largest.
    const Int16x magnitude = _mm512_set1_epi32(0x7fffffff);
    Int16x most = _mm512_setzero_si512();
    for (long k = 0; k < inputs; k += LANES) {
        const Int16x bits = _mm512_castps_si512(load(x + k, first_lanes(inputs - k)));
        most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
    }
    const int bits = _mm512_reduce_max_epi32(most);
    std::memcpy(&largest, &bits, 4);
    largest = largest < 0x1p-100f ? 0x1p-100f : largest;
    const Float16x factor = all(127.0f / largest);
    for (long k = 0; k < terms; k += LANES) {
        const Float16x scaled = _mm512_mul_ps(load(x + k, first_lanes(inputs - k)), factor);
        const Int16x level = _mm512_cvttps_epi32(_mm512_add_ps(scaled, all(128.5f)));
        _mm512_mask_cvtepi32_storeu_epi8(levels + k, first_lanes(terms - k), level);
    }
}

// Memory that a thread keeps for its next call.
uint8_t* scratch(size_t bytes) {
    thread_local std::unique_ptr<uint8_t, decltype(&std::free)> memory{nullptr, &std::free};
    thread_local size_t size = 0;
    if (size < bytes) {
        size = (bytes + 4095) / 4096 * 4096;
        memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size)));
    }
    return memory.get();
}

constexpr long MANY_NUMBERS = 1 << 14;  // below this, threads take longer to wake than to work

void integer_product(const float* x, long x_stride, const Matrix& weight, float* y, long rows) {
    const long inputs = weight.inputs, outputs = weight.outputs;
    const auto* panels = static_cast<const int8_t*>(weight.panels);
    const long terms = (inputs + 3) / 4 * 4;
    const long stride = (terms + 63) / 64 * 64;
    uint8_t* levels = scratch(rows * (stride + sizeof(float)));
    auto* row_scales = reinterpret_cast<float*>(levels + rows * stride);
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * inputs > MANY_NUMBERS)
    for (long row = 0; row < rows; row++)
        quantize_row(x + row * x_stride, inputs, terms, levels + row * stride, row_scales[row]);
    for_tasks(rows, outputs, terms * PANEL, [&](const Task& task) {
        for_tiles(task.rows, [&](long offset, long tile_rows) {
            const long row = task.row + offset;
            for (long panel = task.panel; panel < task.panel + task.panels; panel++) {
                const long output = panel * PANEL;
                const IntegerTile tile{
                    levels + row * stride, stride, row_scales + row, y + row * outputs + output,
                    outputs, weight.start + output, weight.scales + output,
                    weight.bias ? weight.bias + output : nullptr, outputs - output};
                with_rows(tile_rows, [&](auto constant) {
                    multiply_integer_tile<constant>(tile, panels + panel * terms * PANEL, terms);
                });
            }
        });
    });
}

}  // namespace

extern "C" {

void use_threads(int count) { threads = count; }

// Any number of rows; of integers they are quantised on the way.
void product(const float* x, long x_stride, const Matrix* weight, float* y, long rows) {
    switch (weight->kind) {
        case WIDE: return float_product<Wide>(x, x_stride, *weight, y, rows);
        case BRAIN: return float_product<Brain>(x, x_stride, *weight, y, rows);
        default: return integer_product(x, x_stride, *weight, y, rows);
    }
}

}  // extern "C"
