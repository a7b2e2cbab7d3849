"""What is installed, what fits on this machine, and what a run will cost."""
