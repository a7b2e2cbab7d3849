"""The small model that most tests use."""

#: Odd sizes, so that a wrong axis shows in a shape; square projections, so that one may not.
SMALL = {"vocab_size": 211, "n_embd": 48, "n_layer": 3, "n_head": 4, "rotary_dim": 6}
