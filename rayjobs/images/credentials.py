"""C2PA content credentials: a signed note inside a picture's file that says who made it, and how.

Owns the note's wording, the signature and what is told of one that is found. `c2pa-python` does the
work, of the extra `provenance`. Knows nothing of where keys lie. Each signature has a number of its
own, its time and, of most kinds of key, a random part: no two files are the same.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's word for what a generative model made."""
RECORD = "io.github.rayjobs.record"
"""The label of the assertion that holds a picture's id and model."""
TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}
"""By the extension that `encode.extension_of` tells."""
NO_LIBRARY = "content credentials need c2pa-python; install it: pip install 'rayjobs[provenance]'"
CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


class BadKey(ValueError):
    """What is wrong with a key or a certificate, as a phrase."""


@dataclass(frozen=True)
class Found:
    """Credentials that are in a file: who signed them, and whether they fit it."""

    signer: str
    is_valid: bool
    is_trusted: bool
    faults: tuple[str, ...]
    """C2PA's codes of what is wrong, such as assertion.dataHash.mismatch."""
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Signing:
    """An operator's key and certificates, as PEM: the signer's own first, then its issuers'."""

    certificates: bytes
    key: bytes
    timestamps: str | None = None
    """The URL of a timestamp authority (RFC 3161)."""

    def sign(self, data: bytes, extension: str, record: Mapping[str, Any]) -> bytes:
        """The picture's file with credentials that name its record. Raises BadKey."""
        c2pa = load_library()
        out = io.BytesIO()
        try:
            with c2pa.Signer.from_info(self._info) as signer, self._builder(record) as builder:
                builder.sign(signer, TYPES[extension], io.BytesIO(data), out)
        except c2pa.C2paError as error:
            raise BadKey(f"cannot sign: {_first_line(error)}") from None
        return out.getvalue()

    @cached_property
    def _info(self) -> Any:
        c2pa = load_library()
        kind = getattr(c2pa.C2paSigningAlg, algorithm(self.key))
        return c2pa.C2paSignerInfo(kind, self.certificates, self.key, self.timestamps)

    def _builder(self, record: Mapping[str, Any]) -> Any:
        c2pa = load_library()
        # Thumbnails would be larger than the picture.
        settings = c2pa.Settings.from_dict({"builder": {"thumbnail": {"enabled": False}}})
        return c2pa.Builder(_note(record), context=c2pa.Context(settings))


def algorithm(key: bytes) -> str:
    """C2PA's name of what a private key signs with. Raises BadKey."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError):
        raise BadKey("is no private key in PEM without a password") from None
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ED25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "PS256"
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in CURVES:
        return CURVES[private.curve.name]
    raise BadKey("is of a kind that C2PA does not know; use Ed25519, RSA, P-256, P-384 or P-521")


def read_credentials(data: bytes, extension: str, anchors: bytes | None = None) -> Found | None:
    """What a picture's file says of itself, None where it says nothing.

    It is trusted when its certificates lead to one of the `anchors`, which are PEM too.
    """
    c2pa = load_library()
    trust = {} if anchors is None else {"trust": {"trust_anchors": anchors.decode()}}
    context = c2pa.Context(c2pa.Settings.from_dict({"verify": {"verify_trust": True}, **trust}))
    try:
        reader = c2pa.Reader.try_create(TYPES[extension], io.BytesIO(data), context=context)
    except c2pa.C2paError as error:
        return Found("nobody", False, False, (_first_line(error),), {})
    if reader is None:
        return None
    with reader:
        whole = json.loads(reader.json())
        state = reader.get_validation_state()
        results = reader.get_validation_results() or {}
    active = whole["manifests"][whole["active_manifest"]]
    signature = active.get("signature_info") or {}
    failures = [each["code"] for each in results.get("activeManifest", {}).get("failure", ())]
    records = [a["data"] for a in active.get("assertions", ()) if a["label"] == RECORD]
    return Found(
        signer=signature.get("common_name") or signature.get("issuer") or "nobody",
        is_valid=state in ("Valid", "Trusted"),
        is_trusted=state == "Trusted",
        faults=tuple(code for code in failures if code != "signingCredential.untrusted"),
        record=records[0] if records else {},
    )


def _note(record: Mapping[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    agent = {"name": "rayjobs", "version": version("rayjobs")}
    action = {"action": "c2pa.created", "softwareAgent": agent, "digitalSourceType": MADE}
    return {
        "claim_generator_info": [agent],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
            {"label": RECORD, "data": dict(record)},
        ],
    }


def load_library() -> Any:
    """c2pa-python, where it is installed. Raises BadKey."""
    try:
        import c2pa
    except ImportError:
        raise BadKey(NO_LIBRARY) from None
    return c2pa


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
