"""What proves and measures the GPU's side of the model, on a machine that has a card."""
