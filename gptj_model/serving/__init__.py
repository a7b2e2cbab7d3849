"""The model as a TensorFlow program that needs no code of this project."""
