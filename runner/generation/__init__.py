"""What `gptj generate` makes of prompts, settings and stop strings before a model computes."""
