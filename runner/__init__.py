"""The program people run: the `gptj` command, training, evaluation and data."""
