// The kernels' functions, and the forms in which they are told things.
//
// Python mirrors each struct, field by field: see `structures.py`.

#pragma once

#include <cstdint>

extern int threads;  // that a kernel shares its work among

// A packed weight. `start` and `scales` are of integers alone, `bias` may be null.
struct Matrix {
    const void* panels;
    const int32_t* start;
    const float *scales, *bias;
    long inputs, outputs;
    long kind;
};

enum Kind : long { WIDE, BRAIN, INTEGER };

// Keys and values of a layer, of 32 bits; or of 8, with a scale for each slot and head.
struct Cache {
    void *keys, *values;
    float *key_scales, *value_scales;
};

// How a model's heads lie: [queries | keys | values] in each row.
struct Heads {
    long queries, keys, width;
    float epsilon;  // of their norms
    float scale;    // of scores
    long is_narrow;  // whether the cache has 8 bits
};

// Where the rows of a step are, and what turns them.
struct Rows {
    long count, stored;  // rows beyond the stored ones are padding
    const int64_t* slots;
    const int64_t* positions;         // of rows in the tables below; null: row by row
    const float *cosines, *sines;  // [positions, width]
};

// The rows of one sequence, of which `position` is the first one's; its blocks start at `table`.
struct Span {
    int64_t row, tokens, position, table;
};

struct Spans {
    const Span* spans;
    long count;
    const int64_t* tables;
    long block_size;
};

struct Layer {
    const float *attention_norm, *mlp_norm;
    const float* qk_norm;  // [queries + keys, width], or null
    Matrix qkv, output, gate_up, down;
    Cache cache;
};

// What guessing some tokens after each other needs besides the layers.
struct Guessing {
    const void* embedding;  // [vocabulary, width], bfloat16 or 32 bits
    long is_brain;
    const float* norm;
    Matrix head;
    const float* inverse_temperatures;  // of each span; 0 takes the likeliest
    const int64_t* keys;                // of the noise, [depth, spans]
    int64_t* tokens;                    // what is guessed, [depth, spans]
    long depth;
};

extern "C" {
void use_threads(int count);
void product(const float* x, long x_stride, const Matrix* weight, float* y, long rows);
void add_and_normalise(float* hidden, const float* delta, const float* weight, float* normed,
                       long rows, long width, float epsilon);
void silu_and_multiply(const float* gate_and_up, float* y, long rows, long width);
void rotate_and_store(float* heads, const float* qk_norm, const Heads* form, const Rows* rows,
                      const Cache* cache);
void attend(const float* heads, float* output, const Heads* form, const Spans* spans,
            const Cache* cache);
void run_layers(float* hidden, const Layer* layers, long num_layers, const Heads* form,
                const Rows* rows, const Spans* spans, float* memory);
void nearly_draw(const float* logits, long rows, long width, const float* inverse_temperatures,
                 const int64_t* keys, int64_t* ids);
}
