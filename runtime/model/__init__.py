"""Everything that touches torch: layers, KV tensors, the sampler, the model runner."""
