"""Texts into token ids by the fastest library that gives exactly the ids of `tokenizers`."""
