"""Written YAML: readers of versions 1.1 and 1.2 find the same values in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import runner
from gptj_convert.settings.params_yaml import read_yaml, yaml_text
from gptj_convert.settings.pretraining import continued_pretraining
from gptj_convert.settings.trainer_yaml import trainer
from gptj_model.config import GPTJConfig
from runner.config.params_file import validate
from tests.conftest import SMALL

#: What the two versions, and the programs that read them, take for different things.
TRAPS = (
    "on", "Off", "no", "Yes", "y", "N", "true", "null", "Null", "~", "", " ", "1_000", "0o7", "010",
    "0x1f", "0b1", "12:30", "1:2.5", "1e-5", "5e-05", "1.", ".5", ".inf", ".nan", "+1", "-",
    "2001-01-01", "2001-01-01 10:00:00", "=", "<<", "*a", "&a", "!t", "%", "@", "`", "?", ": ", "#",
    "a: b", "a #b", "[a", "{a", "a\nb", "a\tb", "---", "...", "/data/a b", "../data", "é", "\ufeff",
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TRAPS)
NUMBERS = st.integers() | st.floats(allow_nan=False)
NUMBER_LIKE = st.from_regex(r"[-+]?[0-9_.:eExob+-]{1,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT | NUMBER_LIKE
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def _assert_same(found: Any, expected: Any) -> None:
    """Compare values and types: `1` is not `1.0`, and neither is "1"."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            _assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            _assert_same(*pair)
    else:
        assert found == expected


def _both(text: str, path: Path) -> list[Any]:
    path.write_text(text, encoding="utf-8")
    return [yaml.safe_load(text), read_yaml(path)]


@given(values=st.dictionaries(TEXT, VALUES, max_size=4))
def test_both_versions_read_what_was_written(values: dict[str, Any], tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    for found in _both(yaml_text(values), path):
        _assert_same(found, values)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_word_with_two_meanings_stays_a_word(trap: str, tmp_path: Path):
    for found in _both(yaml_text({"key": trap, trap: 5e-05}), tmp_path / "any.yaml"):
        assert found == {"key": trap, trap: 5e-05}


def test_the_files_of_a_conversion_and_of_a_run(tmp_path: Path):
    config = GPTJConfig.preset("tiny", **SMALL, layer_norm_epsilon=1e-5)
    values = continued_pretraining(config)
    values["optimizer"]["learning_rate"] = 5e-05
    params = validate(values, {}, where="x")
    clients, ours = trainer(config, values), params.to_yaml()
    for text in (yaml_text(values), yaml_text(clients), ours):
        first, second = _both(text, tmp_path / "any.yaml")
        _assert_same(first, second)
    rates = yaml.safe_load(yaml_text(clients))["trainer"]["init"]["optimizer"]["adamw"]
    assert (rates["learning_rate"], rates["eps"]) == (5e-05, 1e-6)


@pytest.mark.parametrize(
    "path", sorted(Path(runner.__file__).parent.glob("configs/*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_files(path: Path):
    text = path.read_text()
    _assert_same(yaml.safe_load(text), read_yaml(path))
