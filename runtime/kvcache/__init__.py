"""Pure bookkeeping of KV blocks. Holds numbers of blocks, never tensors."""
