"""Checkpoint file formats (safetensors, pickle, bundle) and layouts built on them (hf, tf)."""
