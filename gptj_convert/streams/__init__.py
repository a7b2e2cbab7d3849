"""Tensors on the move in bounded memory: strips, prefetching, the thread pipeline, the writer."""
