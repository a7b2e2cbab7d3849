"""Backends, meshes and workers that a run computes on."""
