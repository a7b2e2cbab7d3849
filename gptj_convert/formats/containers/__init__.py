"""File formats that hold named tensors. Nothing here knows GPT-J."""
