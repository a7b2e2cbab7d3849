"""The levels of verification, from cheap to expensive."""
