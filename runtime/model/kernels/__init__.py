"""The GPU's side of the model, as Triton kernels; only a device that runs them imports this."""
