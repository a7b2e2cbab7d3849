"""Load a converted-back folder with plain transformers and hold it against our own model.

Prints the largest difference of logits and both greedy continuations; exits 1 if they differ.

Usage: agree.py HF_FOLDER CHECKPOINT PROMPT TOKENS
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from runner.cli.shared import framework

if __name__ == "__main__":
    folder, checkpoint, prompt, tokens = sys.argv[1:]
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits.numpy()
        made = model.generate(
            **ids, max_new_tokens=int(tokens), do_sample=False, pad_token_id=tokenizer.eos_token_id
        )

    framework.prepare()
    from runner.evaluation.restore import load_model

    ours = np.asarray(load_model(Path(checkpoint))(ids["input_ids"].numpy().astype(np.int32)))
    difference = float(np.abs(ours - logits).max())
    print(f"transformers and gptj: max |Δ| of logits {difference:.1e}, spread {logits.std():.2f}")

    command = ("gptj", "generate", "--prompt", prompt, "--max-new-tokens", tokens, "--json")
    done = subprocess.run(
        [*command, "--model", checkpoint], capture_output=True, text=True, check=True
    )
    found, expected = json.loads(done.stdout)["ids"], made[0].tolist()
    print(f"transformers: {expected}\ngptj:         {found}")
    sys.exit(0 if found == expected and difference <= 1e-4 * logits.std() else 1)
