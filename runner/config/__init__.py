"""params.yaml: its fields, its file, and the words that choose how a model runs."""
