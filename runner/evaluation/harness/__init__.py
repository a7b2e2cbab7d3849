"""EleutherAI's lm-evaluation-harness, run on models of this program."""
