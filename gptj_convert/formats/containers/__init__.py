"""File formats that hold tensors by name. Nothing here knows GPT-J."""
