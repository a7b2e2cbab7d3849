"""The GPT-2 vocabulary in the package is the published one."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files


def test_the_vocabulary_files_have_their_published_digests():
    folder = files("gptj_convert.formats.layouts") / "gpt2"
    stated = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert stated == {
        name: sha256((folder / name).read_bytes()).hexdigest()
        for name in ("encoder.json", "vocab.bpe")
    }
    assert stated["encoder.json"].startswith("196139668be63f3b")
    assert stated["vocab.bpe"].startswith("1ce1664773c50f3e")
