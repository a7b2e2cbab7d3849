"""What this machine has (memory, disk, GPUs, rates) and what GPT-J takes of it."""
