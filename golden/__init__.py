"""What GPT-J must output: prompts, the reference model, how outputs are compared, tolerances."""
