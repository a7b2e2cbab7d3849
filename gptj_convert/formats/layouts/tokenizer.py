"""Tokenizer files, read in the way of AutoTokenizer of transformers 5.23 for a GPT-J.

The class that tokenizer_config.json names determines which files are read, and which file wins
where two disagree:

- The class of GPT-2, also used for a GPT-J whose files name no class, takes vocabulary, merges and
  post-processor from tokenizer.json, or the first two from vocab.json and merges.txt, and creates
  the rest itself.
- A class without rules of its own uses tokenizer.json unchanged.

If tokenizer_config.json has `added_tokens_decoder`, all added tokens come from there. Otherwise
they come from special_tokens_map.json, added_tokens.json and tokenizer.json, where a token of a
later file replaces one of the same id. Added tokens get the ids that follow the vocabulary, in the
order of the ids that the files state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from gptj_convert.files.json_file import read_json
from gptj_convert.formats.layouts.hf import (
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILES,
)
from gptj_model.config import CONFIG_FILE
from gptj_model.errors import FileFault

END_OF_TEXT = "<|endoftext|>"

#: Limits on a JSON file; GPT-J's tokenizer.json has 2.1 MB, 50,400 tokens and 50,000 merges.
MAX_BYTES = 32 * 2**20
MAX_MARKS = 2**21

_DECODER = "added_tokens_decoder"
_EXTRA = "extra_special_tokens"
#: Name of `_EXTRA` before transformers 5.
_ADDITIONAL = "additional_special_tokens"
#: Keys of the special tokens, in the order in which they are added.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
#: Names of AddedToken's flags in files.
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True, slots=True)
class _Rules:
    """Parts that a class of transformers creates itself, regardless of tokenizer.json."""

    defaults: Mapping[str, str]
    normalizer: normalizers.Normalizer | None = None
    post_processor: processors.PostProcessor | None = None
    """Default for a tokenizer.json without a post-processor."""
    reads_post_processor: bool = True


_ENDS: dict[str, str] = dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT)
_GPT2 = "GPT2Tokenizer"
_RULES = {
    _GPT2: _Rules(_ENDS),
    "CodeGenTokenizer": _Rules(_ENDS, post_processor=processors.ByteLevel(trim_offsets=False)),
    "GPTNeoXTokenizer": _Rules(
        _ENDS | {"pad_token": "<|padding|>"},
        normalizer=normalizers.NFC(),
        reads_post_processor=False,
    ),
}
#: Class for each model_type, used if no file names a class.
_OF_MODEL = {"gptj": _GPT2, "gpt2": _GPT2, "gpt_neo": _GPT2, "gpt_neox": "GPTNeoXTokenizer"}
#: Classes without rules of their own.
_PLAIN = ("PreTrainedTokenizer", "TokenizersBackend")


@dataclass(frozen=True, slots=True)
class LoadedTokenizer:
    """Tokenizer, and facts that its files state about it."""

    backend: Tokenizer
    end: int | None
    """Id of its eos_token, or of the token `END_OF_TEXT`; None if it has neither."""
    splits_special: bool
    """Whether the name of a special token in a text is treated as text, according to its files."""
    notes: tuple[str, ...]
    """Notes for the user about parts that are read differently from how they are written."""
    named: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names of special tokens by their keys, such as `eos_token`."""


def read_tokenizer(path: Path) -> LoadedTokenizer:
    """Read the tokenizer of a folder, or a tokenizer.json alone, without truncation or padding.

    Raises:
        FileFault: the tokenizer does not exist, or one of its files is damaged.
    """
    where = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        found = _Reading(path).tokenizer() if path.is_dir() else _alone(path)
    except FileFault:
        raise
    except Exception as e:  # the tokenizers library raises a bare Exception for a bad file
        raise FileFault(f"{where}: is not a tokenizer: {e}") from None
    found.backend.no_truncation()
    found.backend.no_padding()
    return found


def _alone(file: Path) -> LoadedTokenizer:
    if not file.is_file():
        raise _missing(file)
    tokenizer = Tokenizer.from_file(str(file))
    return LoadedTokenizer(tokenizer, tokenizer.token_to_id(END_OF_TEXT), False, ())


def _missing(path: Path) -> FileFault:
    return FileFault(
        f"{path}: not found, expected a tokenizer",
        hint="name a folder with tokenizer.json, such as ./gpt-j-6b",
    )


@dataclass(slots=True)
class _Added:
    """Added tokens by the id that a file states, and by their text."""

    by_id: dict[int, AddedToken] = field(default_factory=dict[int, AddedToken])
    by_name: dict[str, AddedToken] = field(default_factory=dict[str, AddedToken])

    def put(self, stated: int, token: AddedToken) -> None:
        self.by_id[stated] = token
        self.by_name[token.content] = token


class _Reading:
    """Construction of a tokenizer from the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes: list[str] = []
        self._json = self._read(TOKENIZER_FILE)
        self._config = self._read(TOKENIZER_CONFIG_FILE) or {}

    def tokenizer(self) -> LoadedTokenizer:
        rules = self._rules()
        # In a tokenizer.json, the post-processor covers these settings.
        keys, has_json = ("add_bos_token", "add_eos_token"), self._json is not None
        adds = {} if has_json else {k: self._config[k] for k in keys if k in self._config}
        tokenizer = self._backend(rules)
        named, extra, added = self._special_tokens(rules)
        self._add(tokenizer, named, extra, added)
        if adds or not tokenizer.post_processor:
            bos, eos = (
                str(named[f"{name}_token"])
                if adds.get(f"add_{name}_token") and named.get(f"{name}_token") is not None
                else None
                for name in ("bos", "eos")
            )
            tokenizer.post_processor = _template(tokenizer, bos, eos)
        name = END_OF_TEXT if named.get("eos_token") is None else str(named["eos_token"])
        return LoadedTokenizer(
            tokenizer,
            tokenizer.token_to_id(name),
            bool(self._config.get("split_special_tokens", False)),
            tuple(self._notes),
            {key: str(_content(named[key])) for key in _NAMED if named.get(key) is not None},
        )

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        if not path.is_file():
            return None
        return read_json(path, expected="a JSON object", max_bytes=MAX_BYTES, max_marks=MAX_MARKS)

    def _rules(self) -> _Rules | None:
        """Return the rules of the class that the files name, or None for a class without any."""
        model = self._read(CONFIG_FILE) or {}
        named = self._config.get("tokenizer_class") or model.get("tokenizer_class")
        if named is None:
            # Without a known model, transformers uses tokenizer.json unchanged.
            named = _OF_MODEL.get(str(model.get("model_type")))
            return _RULES[named or _GPT2] if named or self._json is None else None
        stated = f"{TOKENIZER_CONFIG_FILE}: tokenizer_class is {named!r}"
        if not isinstance(named, str):
            raise FileFault(f"{self._folder}: {stated}, expected a name")
        named = named.removesuffix("Fast")
        if named in _RULES:
            return _RULES[named]
        if self._json is None:
            self._notes.append(
                f"note: {stated}; without {TOKENIZER_FILE}, the vocabulary is read by the rules "
                f"of {_GPT2}"
            )
            return _RULES[_GPT2]
        if named not in _PLAIN:
            self._notes.append(
                f"note: {stated}; {TOKENIZER_FILE} is used unchanged, without rules of that class"
            )
        return None

    def _backend(self, rules: _Rules | None) -> Tokenizer:
        if rules is None:
            return Tokenizer.from_file(str(self._folder / TOKENIZER_FILE))
        post_processor = rules.post_processor
        if self._json is not None:
            vocab, merges = self._vocabulary(self._json)
            stated = Tokenizer.from_str(_without_tokens(self._json)).post_processor
            if rules.reads_post_processor:
                post_processor = stated or post_processor
        else:
            vocab, merges = BPE.read_file(*self._vocabulary_files())
        tokenizer = Tokenizer(
            BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="")
        )
        # None cannot be assigned to a normalizer.
        if rules.normalizer:
            tokenizer.normalizer = rules.normalizer
        prefix_space = self._config.get("add_prefix_space", False)
        if not isinstance(prefix_space, bool):
            raise FileFault(
                f"{self._folder / TOKENIZER_CONFIG_FILE}: add_prefix_space is {prefix_space!r}, "
                "expected true or false"
            )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        tokenizer.decoder = decoders.ByteLevel()
        if post_processor:
            tokenizer.post_processor = post_processor
        return tokenizer

    def _vocabulary(self, values: Mapping[str, Any]) -> tuple[dict[str, int], list[Any]]:
        model = values.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        merges = model.get("merges") if isinstance(model, dict) else None
        if not isinstance(vocab, dict) or not isinstance(merges, list):
            raise FileFault(
                f"{self._folder / TOKENIZER_FILE}: its model is not a byte-pair encoding, expected "
                "`vocab` and `merges`"
            )
        return vocab, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]

    def _vocabulary_files(self) -> tuple[str, str]:
        pairs = [(self._folder / v, self._folder / m) for v, m in VOCABULARY_FILES]
        for vocabulary, merges in pairs:
            if vocabulary.is_file() and merges.is_file():
                return str(vocabulary), str(merges)
            if vocabulary.is_file():
                raise FileFault(
                    f"{merges}: not found, expected the merges of {vocabulary.name}",
                    hint="copy it from the source of the tokenizer",
                )
        raise _missing(self._folder / TOKENIZER_FILE)

    def _special_tokens(
        self, rules: _Rules | None
    ) -> tuple[dict[str, str | AddedToken], list[str | AddedToken], _Added]:
        """Return the special tokens with a key, those without one, and all added tokens."""
        settings = dict(self._config)
        if _ADDITIONAL in settings and not settings.get(_EXTRA):
            settings[_EXTRA] = settings.pop(_ADDITIONAL)
        names = {
            key: value
            for key, value in settings.items()
            if key.endswith("_token") and key not in _NAMED and isinstance(value, str)
        }
        settings = {k: v for k, v in settings.items() if k not in names}
        if isinstance(settings.get(_EXTRA), dict):
            names |= settings.pop(_EXTRA)
        added = _Added()
        if _DECODER in settings:
            self._read_decoder(settings[_DECODER], added)
        else:
            names |= self._merge_special_tokens(settings)
            self._read_added_tokens(settings, added)
            self._read_tokenizer_json(added)
        defaults = rules.defaults if rules else self._padding()
        file = self._folder / TOKENIZER_CONFIG_FILE
        tokens: dict[str, str | AddedToken] = {}
        for key in _NAMED:
            value = _token(settings.get(key, defaults.get(key)), file, key)
            if value is not None and key in settings:  # no file changes a default
                value = added.by_name.get(str(_content(value)), value)
            if value is not None:
                tokens[key] = value
        own = {
            key: value
            for key, value in settings.items()
            if key.endswith("_token") and key not in _NAMED and _is_token(value)
        }
        for key, value in (own | names).items():
            if (token := _token(value, file, key)) is not None:
                tokens[key] = token
        extra = settings.get(_EXTRA if _EXTRA in settings else _ADDITIONAL) or []
        if not isinstance(extra, list):
            raise FileFault(f"{file}: {_EXTRA} is {_kind(extra)}, expected a list of tokens")
        each = (_token(value, file, _EXTRA) for value in extra)
        return tokens, [token for token in each if token is not None], added

    def _padding(self) -> dict[str, Any]:
        """Return the padding token of tokenizer.json under its key, if it has one."""
        padding = self._json.get("padding") if self._json else None
        return {"pad_token": padding.get("pad_token")} if isinstance(padding, dict) else {}

    def _read_decoder(self, values: Any, added: _Added) -> None:
        file = self._folder / TOKENIZER_CONFIG_FILE
        if not isinstance(values, dict):
            raise FileFault(f"{file}: {_DECODER} is {_kind(values)}, expected an object")
        for stated, value in values.items():
            if not isinstance(value, dict):
                raise FileFault(
                    f"{file}: {_DECODER}[{stated!r}] is {_kind(value)}, expected a token's object"
                )
            if not re.fullmatch(r"\s*-?\d{1,18}\s*", stated, re.ASCII):
                raise _no_id(stated, file, _DECODER)
            added.put(int(stated), _added_token(value, file))

    def _merge_special_tokens(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Override `settings` by special_tokens_map.json, and return the tokens that it names."""
        file = self._folder / SPECIAL_TOKENS_FILE
        for key, value in (self._read(SPECIAL_TOKENS_FILE) or {}).items():
            if isinstance(value, dict) and key != _EXTRA:
                settings[key] = _added_token(value | {"special": True}, file)
            elif isinstance(value, list) and key == _EXTRA:
                before = settings.get(_EXTRA)
                tokens: list[Any] = list(before) if isinstance(before, list) else []
                for item in value:
                    token = item
                    if isinstance(item, dict):
                        token = _added_token(item | {"special": True}, file)
                    if token not in tokens:
                        tokens.append(token)
                settings[_EXTRA] = tokens
            else:
                settings[key] = value
        return settings.pop(_EXTRA) if isinstance(settings.get(_EXTRA), dict) else {}

    def _read_added_tokens(self, settings: Mapping[str, Any], added: _Added) -> None:
        file = self._folder / ADDED_TOKENS_FILE
        extra = settings.get(_EXTRA)
        tokens: list[Any] = [settings.get(key) for key in _NAMED]
        tokens += extra if isinstance(extra, list) else []
        # Objects of tokenizer_config.json are skipped: transformers compares before it parses them.
        special = {str(token) for token in tokens if isinstance(token, str | AddedToken)}
        for name, stated in (self._read(ADDED_TOKENS_FILE) or {}).items():
            is_special = name in special
            token = AddedToken(name, normalized=not is_special, special=is_special)
            if type(stated) is not int:
                raise _no_id(stated, file, repr(name))
            added.put(stated, token)

    def _read_tokenizer_json(self, added: _Added) -> None:
        file = self._folder / TOKENIZER_FILE
        tokens = self._json.get("added_tokens", []) if self._json else []
        if not isinstance(tokens, list) or not all(isinstance(t, dict) for t in tokens):
            raise FileFault(f"{file}: added_tokens is not a list of tokens")
        for token in tokens:
            values = {k: v for k, v in token.items() if k != "id"}
            if type(stated := token.get("id")) is not int:
                raise _no_id(stated, file, "added_tokens")
            added.put(stated, _added_token(values, file))

    def _add(
        self,
        tokenizer: Tokenizer,
        named: Mapping[str, str | AddedToken],
        extra: Iterable[str | AddedToken],
        added: _Added,
    ) -> None:
        """Add the tokens that the vocabulary lacks, in the order that determines their ids."""
        tokens: list[Any] = [token for _, token in sorted(added.by_id.items())]
        known = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
        known += [str(_content(token)) for token in tokens]
        for token in (*named.values(), *extra):
            if str(_content(token)) not in known and token not in tokens:
                tokens.append(token)
        names = {str(_content(token)) for token in named.values()}
        for n, token in enumerate(tokens):
            if isinstance(token, str):
                tokens[n] = AddedToken(token, special=True)
            elif token.content in names:
                token.special = True
        tokenizer.add_tokens(tokens)
        moved = [
            (token.content, stated, tokenizer.token_to_id(token.content))
            for stated, token in sorted(added.by_id.items())
            if token.content and tokenizer.token_to_id(token.content) != stated
        ]
        if moved:
            (name, stated, found), more = moved[0], len(moved) - 1
            self._notes.append(
                f"note: {self._folder}: the token {name!r} has the id {stated} in a file and gets "
                f"the id {found}, as in transformers{f'; {more} more ids differ' if more else ''}"
            )


def _template(
    tokenizer: Tokenizer, bos: str | None, eos: str | None
) -> processors.TemplateProcessing:
    """Return the post-processor that puts these tokens around a text."""
    ends = [token for token in (bos, eos) if token]
    parts = [f"{bos}:0" if bos else "", "$A:0", f"{eos}:0" if eos else ""]
    return processors.TemplateProcessing(
        single=" ".join(filter(None, parts)),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ends],
    )


def _content(token: Any) -> Any:
    """Return the text of a token in any of the forms used in files."""
    if isinstance(token, AddedToken):
        return token.content
    return token.get("content") if isinstance(token, dict) else token


def _token(value: Any, file: Path, key: str) -> str | AddedToken | None:
    """Return the special token that a file states as a name or an object; None for null."""
    if value is None or isinstance(value, str | AddedToken):
        return value
    if isinstance(value, dict):
        return _added_token(value, file)
    raise FileFault(f"{file}: {key} is {_kind(value)}, expected a token")


def _added_token(values: Mapping[str, Any], file: Path) -> AddedToken:
    """Return the token that an object states; unknown keys of the object are ignored."""
    content = values.get("content", "")
    flags = {flag: values[flag] for flag in _FLAGS if flag in values}
    wrong = next((f for f, value in flags.items() if not isinstance(value, bool)), None)
    if not isinstance(content, str) or wrong:
        key, value = (wrong, flags[wrong]) if wrong else ("content", content)
        expected = "true or false" if wrong else "a text"
        raise FileFault(f"{file}: {key} of a token is {value!r}, expected {expected}")
    return AddedToken(content, **flags)


def _is_token(value: Any) -> bool:
    """Return whether the value of a setting has the form of a token."""
    is_tagged = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return is_tagged or isinstance(value, str | AddedToken)


def _no_id(value: Any, file: Path, where: str) -> FileFault:
    return FileFault(f"{file}: {where}: the id is {value!r}, expected a whole number")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a JSON {type(value).__name__}"


def _without_tokens(values: Mapping[str, Any]) -> str:
    """Return a tokenizer.json without its vocabulary, from which the other parts are built."""
    model = values["model"] | {"vocab": {}, "merges": []}
    return json.dumps({**values, "model": model, "added_tokens": []})
