"""The `gptj` command: `root` holds the program, one file a command."""
