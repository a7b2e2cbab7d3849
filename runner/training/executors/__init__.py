"""Executors whose weights are in memory, and the protocol that every executor implements."""
