"""Writing text with the model: sampling, greedy decoding and beam search."""
