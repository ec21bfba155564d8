"""An operator's key and certificates as C2PA wants them, made for a test and thrown away."""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Chain:
    """As PEM: the operator's certificate and its issuer's, the key, the issuer alone."""

    certificates: bytes
    key: bytes
    issuer: bytes

    def write(self, folder: Path) -> dict[str, str]:
        """The keys `provenance.certificates` and `provenance.key`."""
        files = {"certificates": self.certificates, "key": self.key}
        for name, data in files.items():
            (folder / f"{name}.pem").write_bytes(data)
        return {name: str(folder / f"{name}.pem") for name in files}


def make_chain() -> Chain:
    issuer_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _certificate("issuer", issuer_key, "issuer", issuer_key, is_issuer=True)
    own = _certificate("operator", key, "issuer", issuer_key, is_issuer=False)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Chain(own + issuer, private, issuer)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_issuer: bool,
) -> bytes:
    now, public = dt.datetime.now(dt.UTC), key.public_key()
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    use = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment"), False)
    use |= dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False)
    use |= {"digital_signature": True, "key_cert_sign": is_issuer, "crl_sign": is_issuer}
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
        .add_extension(x509.BasicConstraints(is_issuer, None), critical=True)
        .add_extension(x509.KeyUsage(**use), critical=True)
        .add_extension(by, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    if not is_issuer:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(common: str) -> x509.Name:
    names = {NameOID.ORGANIZATION_NAME: "Tests", NameOID.COMMON_NAME: common}
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in names.items()])
