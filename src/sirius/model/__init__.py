"""What sirius adds to a transformers model: gated MLPs that can skip neurons, and a KV cache that can be rewritten."""
