"""The Keras model: layers, rotary position embedding, loss, and its variables by name."""
