// All layers of a model, one after the other: what `transformer.py` says, in one call.

#include "kernels.h"

namespace {

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
// for a row's numbers in each of the six forms below, times the rows rounded up to 16.
void run_layers(float* hidden, const Layer* layers, long num_layers, const Heads* form,
                const Rows* rows, const Spans* spans, float* memory) {
    const long count = rows->count;
    const long width = layers[0].qkv.inputs, inner = layers[0].down.inputs;
    Pieces pieces(memory);
    float* normed = pieces.take(count * width);
    float* delta = pieces.take(count * width);
    float* heads = pieces.take(count * layers[0].qkv.outputs);
    float* attended = pieces.take(count * layers[0].output.inputs);
    float* gate_and_up = pieces.take(count * 2 * inner);
    float* activated = pieces.take(count * inner);
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
        product(normed, width, &layer.gate_up, gate_and_up, count);
        silu_and_multiply(gate_and_up, activated, count, inner);
        product(activated, inner, &layer.down, delta, count);
    }
    for (long i = 0; i < count * width; i++) hidden[i] += delta[i];
}

}  // extern "C"
