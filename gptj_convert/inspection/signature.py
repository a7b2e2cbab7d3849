"""model.sig, the OpenSSF signature of a model: the files that it lists, and who signed the list.

It is a sigstore bundle around an in-toto statement. The statement is read here, so that files can
be compared with it by anybody; whether it is signed is for the library `model_signing` to say.
"""

from __future__ import annotations

import base64
import binascii
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from gptj_convert.files.file_name import is_inner_path
from gptj_convert.files.json_file import parse_json, read_json
from gptj_convert.hub.download import RECORD_FILE
from gptj_model.errors import FileFault, HubFault, UsageError

if TYPE_CHECKING:
    from model_signing.verifying import Config

SIGNATURE_FILE = "model.sig"

_PREDICATE = "https://model_signing/signature/v1.0"
#: Largest signature, and number of values in it; that of a model with a thousand files has 200 kB.
_MAX_BYTES = 2**24
_MAX_MARKS = 2**20
_SHA256 = re.compile("[0-9a-f]{64}")
#: Keys of a bundle, and of the envelope in it.
_BUNDLE = {"mediaType", "verificationMaterial", "dsseEnvelope"}
_ENVELOPE = {"payload", "payloadType", "signatures"}


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose signature is expected: the owner of a key, or an identity that sigstore knows."""

    key: Path | None = None
    """File with a public key, or with root certificates, as PEM."""
    identity: str | None = None
    """Identity in sigstore's certificate, such as an e-mail address."""
    provider: str | None = None
    """Address of the OpenID provider that vouches for the identity."""

    def __str__(self) -> str:
        return str(self.key) if self.key else f"{self.identity} ({self.provider})"


@dataclass(frozen=True, slots=True)
class Statement:
    """What a signature states about the files of a folder."""

    files: Mapping[str, str]
    """SHA-256 in hex of every file, by its path in the folder."""
    ignored: tuple[str, ...]
    """Paths of files and folders that were left out."""
    follows_links: bool

    def unsigned(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Yield the files that the statement does not list, with what they are."""
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if self._is_ignored(name):
                continue
            if path.is_symlink() and not self.follows_links:
                yield name, "a link, which the signature does not allow"
            elif path.is_file() and name not in self.files:
                yield name, "a file that is not signed"

    def _is_ignored(self, name: str) -> bool:
        # The record of a download is younger than any signature.
        unsigned = (SIGNATURE_FILE, RECORD_FILE, *self.ignored)
        return any(PurePosixPath(name).is_relative_to(other) for other in unsigned)


def read_statement(path: Path) -> Statement:
    """Return what a signature states; whether anybody signed it is not checked.

    Raises:
        FileFault: the file is no such signature, or was made in a way that is not implemented.
    """
    bundle = read_json(
        path, expected="a model signature", max_bytes=_MAX_BYTES, max_marks=_MAX_MARKS
    )
    try:
        envelope = bundle["dsseEnvelope"]
        # The library accepts other spellings of these keys, and must not read another payload.
        if unknown := sorted((bundle.keys() - _BUNDLE) | (envelope.keys() - _ENVELOPE)):
            raise _fault(path, f"has the unknown key {unknown[0]!r}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        found = parse_json(payload, where=str(path), max_marks=_MAX_MARKS)
        if found["predicateType"] != _PREDICATE:
            raise _fault(path, f"states {found['predicateType']!r}, expected {_PREDICATE!r}")
        predicate = found["predicate"]
        made = predicate["serialization"]
        files = {r["name"]: _digest(path, r, made) for r in predicate["resources"]}
        ignored = tuple(map(str, made.get("ignore_paths", ())))
        statement = Statement(files, ignored, made["allow_symlinks"] is True)
    except (KeyError, TypeError, AttributeError, binascii.Error) as e:
        raise _fault(path, f"holds no signed list of files ({type(e).__name__}: {e})") from None
    if outside := [name for name in files if not is_inner_path(name)]:
        raise _fault(path, f"lists {outside[0]!r}, which is not a file in this folder")
    return statement


def _digest(path: Path, resource: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """Return the SHA-256 that is stated of a file."""
    kind = made["method"], made["hash_type"], resource["algorithm"]
    if kind != ("files", "sha256", "sha256"):
        raise FileFault(
            f"{path}: states {made['hash_type']} of {made['method']}, expected sha256 of files",
            hint=f"check it with the program that made it: `model_signing verify … {path.parent}`",
        )
    if not _SHA256.fullmatch(resource["digest"]):
        raise _fault(path, f"states {resource['digest']!r} of {resource['name']!r}")
    return resource["digest"]


def _fault(path: Path, what: str) -> FileFault:
    return FileFault(f"{path}: {what}", hint="fetch it again from where the model came from")


def verify_signer(path: Path, statement: Statement, signer: Signer) -> str | None:
    """Return why a signature is not the expected signer's, or None if it is.

    Args:
        path: the signature.
        statement: content of the signature, as `read_statement` returns it.
        signer: expected signer.

    Raises:
        UsageError: the file holds no key or certificate that signs models.
        HubFault: sigstore's keys cannot be fetched.
        ModuleNotFoundError: the library is not installed.
        OSError: a file cannot be read.
    """
    from model_signing import hashing
    from model_signing._hashing.hashing import Digest  # pyright: ignore  (has no public name)
    from model_signing.manifest import FileManifestItem, Manifest, SerializationType
    from model_signing.verifying import Config

    made = {"method": "files", "hash_type": "sha256", "allow_symlinks": statement.follows_links}
    kind = SerializationType.from_args(made)
    digests = {name: bytes.fromhex(digest) for name, digest in statement.files.items()}

    class Stated(hashing.Config):
        """Hashes of the statement: files were compared with them, and need not be read again."""

        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Manifest:
            signed = [
                FileManifestItem(path=PurePosixPath(name), digest=Digest("sha256", digest))
                for name, digest in digests.items()
            ]
            return Manifest(path.parent.name, signed, kind)

    config = Config()
    _expect(config, signer)
    config.set_hashing_config(Stated())
    try:
        with redirect_stdout(sys.stderr):  # it prints warnings
            config.verify(path.parent, path)
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as e:  # whatever a library raises about a signature, it has not verified it
        text = " ".join(str(e).split()) or "the signature does not fit"
        return f"{type(e).__name__}: {text[:300]}"
    return None


def _expect(config: Config, signer: Signer) -> None:
    """Set the signer that a verification expects."""
    if not signer.key:
        from sigstore.errors import Error

        try:
            config.use_sigstore_verifier(
                identity=signer.identity or "", oidc_issuer=signer.provider or ""
            )
        except Error as e:
            raise HubFault(
                f"the keys of sigstore cannot be fetched: {' '.join(str(e).split())[:200]}",
                hint="check the network; --public-key needs none",
            ) from None
        return
    data = signer.key.read_bytes()
    try:
        if b"-----BEGIN CERTIFICATE-----" in data:
            config.use_certificate_verifier(certificate_chain=[signer.key])
        else:
            config.use_elliptic_key_verifier(public_key=signer.key)
    except (ValueError, TypeError, AttributeError) as e:  # other keys have no curve
        raise UsageError(
            f"{signer.key}: is not a public key or a certificate: {' '.join(str(e).split())[:200]}",
            hint="name a PEM file with an elliptic-curve public key, or with root certificates",
        ) from None
