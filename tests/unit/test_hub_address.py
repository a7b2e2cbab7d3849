"""Addresses of hub repositories, in the forms that people type and paste."""

from __future__ import annotations

import pytest

from gptj_convert.hub.address import HubAddress, parse_address
from gptj_model.errors import UsageError


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("EleutherAI/gpt-j-6b", "EleutherAI/gpt-j-6b", None),
        ("a/b@float16", "a/b", "float16"),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
        ("hf://a/b@v1.0", "a/b", "v1.0"),
        ("hf:/a/b", "a/b", None),
        ("hf://models/a/b", "a/b", None),
        ("https://huggingface.co/a/b", "a/b", None),
        ("https://huggingface.co/a/b/", "a/b", None),
        ("http://www.huggingface.co/a/b", "a/b", None),
        ("HTTPS://HuggingFace.co/a/b", "a/b", None),
        ("https:/huggingface.co/a/b", "a/b", None),
        ("huggingface.co/a/b", "a/b", None),
        ("hf.co/a/b", "a/b", None),
        ("https://huggingface.co/a/b.git", "a/b", None),
        ("https://huggingface.co/a/b/tree/float16", "a/b", "float16"),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F3", "a/b", "refs/pr/3"),
        ("https://huggingface.co/a/b/tree/refs/pr/3", "a/b", "refs/pr/3"),
        ("https://huggingface.co/a/b/blob/main/config.json", "a/b", "main"),
        ("https://huggingface.co/a/b/resolve/main/x.bin?download=true", "a/b", "main"),
        ("https://huggingface.co/a/b/discussions/3#comment", "a/b", None),
        ("https://huggingface.co/a/b?library=transformers", "a/b", None),
    ],
)
def test_an_address_is_read(text: str, repository: str, revision: str | None):
    assert parse_address(text) == HubAddress(repository, revision)


@pytest.mark.parametrize(
    "text",
    ["", "gpt2", "a/b/c", "/a/b", "a/b@", "a b/c", "https://huggingface.co", "https://hf.co/a",
     "https://huggingface.co/datasets/a/b", "https://huggingface.co/spaces/a/b",
     "https://example.org/a/b", "hf://", "https://huggingface.co/a/b c"],
)  # fmt: skip
def test_other_texts_are_refused(text: str):
    with pytest.raises(UsageError) as e:
        parse_address(text)
    assert repr(text) in e.value.message


def test_a_mirror_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8443")
    assert parse_address("https://hub.example:8443/a/b").repository == "a/b"
