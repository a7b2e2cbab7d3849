"""File formats that hold tensors (`containers`), and how GPT-J lies in them (`layouts`)."""
