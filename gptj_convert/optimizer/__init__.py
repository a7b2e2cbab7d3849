"""The state of an optimizer: found in a checkpoint of any format, and put into another."""
