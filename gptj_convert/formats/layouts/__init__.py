"""GPT-J in each container: file names, tensor names and companion files of a checkpoint."""
