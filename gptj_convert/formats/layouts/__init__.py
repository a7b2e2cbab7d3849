"""Layouts of GPT-J: file names, tensor names and companion files in each format."""
