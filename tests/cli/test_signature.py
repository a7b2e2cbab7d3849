"""`gptj inspect --check` of a folder that the OpenSSF's library has signed."""

from __future__ import annotations

import base64
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from model_signing import hashing, signing

Signing = Callable[[], signing.Config]
PEM = serialization.Encoding.PEM


def _write_keys(name: str, key: Any) -> None:
    """Write NAME.priv and NAME.pub."""
    private = key.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    Path(f"{name}.priv").write_bytes(private)
    Path(f"{name}.pub").write_bytes(public)


def _write_certificate(name: str, key: ec.EllipticCurvePrivateKey) -> None:
    """Write NAME.pem: a certificate that is its own root, and may sign."""
    issued = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "me")])
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "crl_sign", "encipher_only", "decipher_only"), False
    )  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(issued)
        .issuer_name(issued)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=10_000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=True, **usage), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    Path(f"{name}.pem").write_bytes(made.public_bytes(PEM))


@pytest.fixture
def signer(hf: Path) -> Signing:
    """What signs with me.priv; ./hf is not signed yet."""
    _write_keys("me", ec.derive_private_key(12345, ec.SECP256R1()))
    _write_keys("other", ec.derive_private_key(54321, ec.SECP256R1()))
    return lambda: signing.Config().use_elliptic_key_signer(private_key="me.priv")


@pytest.fixture
def signed(signer: Signing, hf: Path) -> Path:
    """./hf, signed with me.priv."""
    signer().sign(hf, hf / "model.sig")
    return hf


def _statement(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The bundle, and the statement in it."""
    bundle = json.loads((folder / "model.sig").read_text())
    return bundle, json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def _restate(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the statement and keep its signature."""
    bundle, statement = _statement(folder)
    change(statement)
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    bundle["dsseEnvelope"]["payload"] = payload
    (folder / "model.sig").write_text(json.dumps(bundle))


def test_files_are_those_that_were_signed(signed: Path, gptj):
    count = len(list(signed.iterdir())) - 1
    done = gptj("inspect", signed, "--check")
    assert done.code == 0
    assert f"compared with model.sig: {count} files" in done.stdout
    assert "note: who signed model.sig was not checked: give --public-key FILE" in done.stdout
    done = gptj("inspect", signed, "--check", "--public-key", "me.pub")
    assert done.code == 0
    assert "signed by me.pub" in done.stdout
    assert "not checked" not in done.stdout
    answer = gptj("inspect", signed, "--check", "--public-key", "me.pub", "--json").json
    assert answer["check"]["signer"] == "me.pub"
    assert answer["check"]["checked"]["model.sig"] == {"files": count + 1, "tensors": 0}


def test_another_signer_is_refused(signed: Path, gptj):
    done = gptj("inspect", signed, "--check", "--public-key", "other.pub")
    assert done.code == 3
    assert "DIFFERS: file model.sig" in done.stdout
    assert "not signed by other.pub: ValueError: Key mismatch" in done.stdout
    assert "the signature of other.pub, by model.sig" in done.stdout
    answer = gptj("inspect", signed, "--check", "--public-key", "other.pub", "--json").json
    assert answer["check"]["signer"] is None


def test_a_changed_missing_or_added_file_is_named(signed: Path, gptj):
    key = ("--public-key", "me.pub")
    config, weights = signed / "config.json", signed / "model.safetensors"
    before = config.read_bytes()
    config.write_bytes(before.replace(b"{", b"{ ", 1))
    done = gptj("inspect", signed, "--check", *key)
    assert done.code == 3
    assert "DIFFERS: file config.json" in done.stdout
    assert "signed by me.pub" in done.stdout
    config.write_bytes(before)
    kept = weights.rename("weights")
    done = gptj("inspect", signed, "--check")
    assert done.code == 3
    assert "DIFFERS: file model.safetensors\n  found:    No such file or directory" in done.stdout
    kept.rename(weights)
    (signed / "code").mkdir()
    (signed / "code/modeling.py").write_text("import os")
    done = gptj("inspect", signed, "--check")
    assert done.code == 3
    assert "DIFFERS: file code/modeling.py\n  found:    a file that is not signed" in done.stdout
    (signed / "code/modeling.py").unlink()
    (signed / "more.json").symlink_to(config)
    done = gptj("inspect", signed, "--check")
    assert done.code == 3
    assert "a link, which the signature does not allow" in done.stdout


def test_ignored_files_may_change(signer: Signing, hf: Path, gptj):
    (hf / "README.md").write_text("before")
    ignored = hashing.Config().set_ignored_paths(paths=["README.md", "model.sig"])
    signer().set_hashing_config(ignored).sign(hf, hf / "model.sig")
    (hf / "README.md").write_text("after")
    (hf / ".git").mkdir()
    (hf / ".git/config").write_text("x")
    assert gptj("inspect", hf, "--check", "--public-key", "me.pub").code == 0


def test_a_list_that_was_changed_after_signing(signed: Path, gptj):
    digest = "0" * 64
    (signed / "config.json").write_text("{}")

    def forge(statement: dict[str, Any]) -> None:
        for resource in statement["predicate"]["resources"]:
            if resource["name"] == "config.json":
                resource["digest"] = digest

    _restate(signed, forge)
    done = gptj("inspect", signed, "--check", "--public-key", "me.pub")
    assert done.code == 3
    assert "DIFFERS: file model.sig\n  found:    not signed by me.pub: " in done.stdout
    assert "signed by me.pub\n" not in done.stdout.partition("DIFFERS")[0]


def _name(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda statement: statement["predicate"]["resources"][0].update(name=name)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_name("../outside"), "lists '../outside', which is not a file in this folder"),
        (_name("/etc/passwd"), "which is not a file in this folder"),
        (lambda s: s["predicate"]["resources"][0].update(digest="x"), "states 'x' of"),
        (lambda s: s["predicate"]["resources"][0].update(digest=5), "no signed list of files"),
        (lambda s: s.update(predicate=[]), "no signed list of files"),
        (lambda s: s.update(predicateType="x"), "states 'x', expected 'https://model_signing/"),
    ],
)
def test_a_list_that_is_none(
    change: Callable[[dict[str, Any]], object], found: str, signed: Path, gptj
):
    _restate(signed, change)
    done = gptj("inspect", signed, "--check", "--public-key", "me.pub")
    assert done.code == 3
    assert found in done.stdout


@pytest.mark.parametrize("inner", [False, True])
def test_a_second_payload_under_another_spelling(inner: bool, signed: Path, gptj):
    """The library must not verify one list while another one is compared with the files."""
    bundle, statement = _statement(signed)
    (signed / "more.py").write_text("import os")
    statement["predicate"]["serialization"]["ignore_paths"].append("more.py")
    forged = base64.b64encode(json.dumps(statement).encode()).decode()
    envelope = bundle["dsseEnvelope"]
    if inner:
        envelope |= {"pay_load": envelope["payload"], "payload": forged}
    else:
        bundle |= {"dsse_envelope": envelope, "dsseEnvelope": envelope | {"payload": forged}}
    (signed / "model.sig").write_text(json.dumps(bundle))
    done = gptj("inspect", signed, "--check", "--public-key", "me.pub")
    assert done.code == 3
    assert "has the unknown key" in done.stdout


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"dsseEnvelope": {"payload": "?"}}'])
def test_a_signature_that_is_none(content: bytes, signed: Path, gptj):
    (signed / "model.sig").write_bytes(content)
    done = gptj("inspect", signed, "--check")
    assert done.code == 3
    assert "DIFFERS: file model.sig" in done.stdout


def test_another_way_of_hashing_is_named(signer: Signing, hf: Path, gptj):
    shards = hashing.Config().use_shard_serialization(shard_size=1000)
    signer().set_hashing_config(shards).sign(hf, hf / "model.sig")
    done = gptj("inspect", hf, "--check")
    assert done.code == 3
    assert "model.sig: states sha256 of shards, expected sha256 of files" in done.stdout


def test_certificates(hf: Path, gptj):
    for number, name in enumerate(("me", "other"), start=7):
        key = ec.derive_private_key(number, ec.SECP256R1())
        _write_keys(name, key)
        _write_certificate(name, key)
    config = signing.Config().use_certificate_signer(
        private_key="me.priv", signing_certificate="me.pem", certificate_chain=["me.pem"]
    )
    config.sign(hf, hf / "model.sig")
    done = gptj("inspect", hf, "--check", "--public-key", "me.pem")
    assert done.code == 0, done.stdout
    assert "signed by me.pem" in done.stdout
    assert gptj("inspect", hf, "--check", "--public-key", "other.pem").code == 3


def test_a_key_that_is_none(signed: Path, gptj):
    Path("text").write_text("no key")
    _write_keys("edwards", ed25519.Ed25519PrivateKey.from_private_bytes(b"x" * 32))
    for name in ("text", "edwards.pub", "me.priv"):
        done = gptj("inspect", signed, "--check", "--public-key", name)
        assert done.code == 2, done.stderr
        assert f"{name}: is not a public key or a certificate" in done.stderr
    done = gptj("inspect", signed, "--check", "--public-key", "nowhere")
    assert done.code == 1
    assert "nowhere" in done.stderr


def test_without_the_network_or_the_library(signed: Path, monkeypatch: pytest.MonkeyPatch, gptj):
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    keyless = ("--identity", "me@home", "--identity-provider", "https://accounts.google.com")
    done = gptj("inspect", signed, "--check", *keyless)
    if done.code == 3:  # with a network, sigstore says that this is no signature of its own
        assert "not signed by me@home (https://accounts.google.com): " in done.stdout
    else:
        assert done.code == 1
        assert "the keys of sigstore cannot be fetched" in done.stderr
    monkeypatch.setitem(sys.modules, "model_signing", None)
    done = gptj("inspect", signed, "--check", "--public-key", "me.pub")
    assert done.code == 1
    assert "install it with `pip install" in done.stderr
    assert "[sign]" in done.stderr
    # Files can be compared without it.
    assert gptj("inspect", signed, "--check").code == 0


def test_options_that_have_no_effect_are_refused(hf: Path, gptj):
    for options in (
        ("--public-key", "me.pub"),
        ("--check", "--identity", "me@home"),
        ("--check", "--identity-provider", "https://home"),
        ("--check", "--identity", "a", "--identity-provider", "b", "--public-key", "c"),
    ):
        assert gptj("inspect", hf, *options).code == 2, options
    assert gptj("convert", hf, "--to", "tf").code == 0
    Path("me.pub").write_text("")
    done = gptj("inspect", "converted", "--check", "--public-key", "me.pub")
    assert done.code == 2
    assert "no model.sig in this folder, expected one of me.pub" in done.stderr
