"""The commands under `gptj data`."""
