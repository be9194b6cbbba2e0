// All layers of a model, one after the other: what `transformer.py` says, in one call.

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

// Rows that an MLP computes at once: what is between its products is large, and stays in the cache.
constexpr long MLP_ROWS = 224;

// Rows of the embedding, widened.
void embed(const Guessing& guessing, const int64_t* tokens, long rows, long width, float* hidden) {
    for (long row = 0; row < rows; row++) {
        float* to = hidden + row * width;
        if (!guessing.is_brain) {
            const auto* from = static_cast<const float*>(guessing.embedding);
            std::memcpy(to, from + tokens[row] * width, width * sizeof(float));
            continue;
        }
        const auto* from = static_cast<const uint16_t*>(guessing.embedding) + tokens[row] * width;
        for (long i = 0; i < width; i++) {
            const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
            std::memcpy(to + i, &bits, sizeof(bits));
        }
    }
}

// Takes pieces of one piece of memory, each of a multiple of 64 bytes.
class Pieces {
   public:
    explicit Pieces(float* memory) : next_(memory) {}

    float* take(long numbers) {
        float* piece = next_;
        next_ += (numbers + 15) / 16 * 16;
        return piece;
    }

   private:
    float* next_;
};

}  // namespace

extern "C" {

// `hidden` [rows, width] becomes what the layers make of it. `memory`, aligned to 64 bytes, has room
// for a row's numbers in each of the six forms below, times the rows rounded up to 16; of the last two
// for `MLP_ROWS` rows at most.
void run_layers(float* hidden, const Layer* layers, long num_layers, const Heads* form,
                const Rows* rows, const Spans* spans, float* memory) {
    const long count = rows->count;
    const long width = layers[0].qkv.inputs, inner = layers[0].down.inputs;
    Pieces pieces(memory);
    float* normed = pieces.take(count * width);
    float* delta = pieces.take(count * width);
    float* heads = pieces.take(count * layers[0].qkv.outputs);
    float* attended = pieces.take(count * layers[0].output.inputs);
    const long most = std::min(MLP_ROWS, count);
    float* gate_and_up = pieces.take(most * 2 * inner);
    float* activated = pieces.take(most * inner);
    // Rows of padding attend to nothing.
    for (long i = rows->stored * layers[0].output.inputs; i < count * layers[0].output.inputs; i++)
        attended[i] = 0.0f;
    const float epsilon = form->epsilon;
    for (long index = 0; index < num_layers; index++) {
        const Layer& layer = layers[index];
        const float* before = index ? delta : nullptr;
        add_and_normalise(hidden, before, layer.attention_norm, normed, count, width, epsilon);
        product(normed, width, &layer.qkv, heads, count);
        rotate_and_store(heads, layer.qk_norm, form, rows, &layer.cache);
        attend(heads, attended, form, spans, &layer.cache);
        product(attended, layer.output.inputs, &layer.output, delta, count);
        add_and_normalise(hidden, delta, layer.mlp_norm, normed, count, width, epsilon);
        for (long row = 0; row < count; row += MLP_ROWS) {
            const long some = std::min(MLP_ROWS, count - row);
            product(normed + row * width, width, &layer.gate_up, gate_and_up, some);
            silu_and_multiply(gate_and_up, activated, some, inner);
            product(activated, inner, &layer.down, delta + row * width, some);
        }
    }
    for (long i = 0; i < count * width; i++) hidden[i] += delta[i];
}

// Guesses `depth` tokens behind each span, one after another. The blocks of all of them are there.
// `memory` is for the layers, `hidden` [rows, width] and `logits` [spans, vocabulary] besides.
void guess(const int64_t* token_ids, const Layer* layers, long num_layers, const Heads* form,
           const Rows* rows, const Spans* spans, const Guessing* guessing, float* hidden,
           float* logits, float* memory) {
    const long width = layers[0].qkv.inputs, count = spans->count;
    const Matrix& head = guessing->head;
    embed(*guessing, token_ids, rows->count, width, hidden);
    run_layers(hidden, layers, num_layers, form, rows, spans, memory);
    // From here on a span is one token, and its row the last that it had.
    std::vector<Span> ends(spans->spans, spans->spans + count);
    std::vector<int64_t> slots(count), positions(count);
    for (long index = 0; index < count; index++) {
        Span& span = ends[index];
        const long last = span.row + span.tokens - 1;  // never before the span's own place
        std::memmove(hidden + index * width, hidden + last * width, width * sizeof(float));
        span = {index, 1, span.position + span.tokens - 1, span.table};
    }
    const Spans single{ends.data(), count, spans->tables, spans->block_size};
    for (long depth = 0; depth < guessing->depth; depth++) {
        int64_t* tokens = guessing->tokens + depth * count;
        if (depth) {
            for (long index = 0; index < count; index++) {
                const long position = ++ends[index].position;
                const long block = spans->tables[ends[index].table + position / spans->block_size];
                slots[index] = block * spans->block_size + position % spans->block_size;
                positions[index] = position;
            }
            const Rows next{count, count, slots.data(), positions.data(), rows->cosines,
                            rows->sines};
            embed(*guessing, tokens - count, count, width, hidden);
            run_layers(hidden, layers, num_layers, form, &next, &single, memory);
        }
        // The layers' memory is free now; norms of a row for each span fit.
        add_and_normalise(hidden, nullptr, guessing->norm, memory, count, width, form->epsilon);
        product(memory, width, &head, logits, count);
        nearly_draw(logits, count, head.outputs, guessing->inverse_temperatures,
                    guessing->keys + depth * count, tokens);
    }
}

}  // extern "C"
