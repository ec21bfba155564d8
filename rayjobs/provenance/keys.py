"""The keys of watermarks and of content credentials.

Owns their names, types and defaults. Imports nothing that draws, signs or reads.
"""

from pydantic import model_validator

from rayjobs.config import Config


class Marking(Config):
    """What leaves the same bytes for the same picture."""

    watermark: bool = False
    """Write the first 64 bits of each picture's image_id into its pixels, where they are not seen,
    and outlive PNG, WebP, JPEG and scaling, but no cropping."""


class Provenance(Marking):
    """Marking, and credentials, which are signed anew each time."""

    certificates: str | None = None
    """A PEM file (local or s3://) of the operator's certificate and its issuers': pictures get
    signed content credentials (C2PA). No two signatures are the same, so neither are the files."""
    key: str | None = None
    """The PEM file of that certificate's private key: Ed25519, RSA, P-256, P-384 or P-521."""
    timestamps: str | None = None
    """The URL of a timestamp authority (RFC 3161), whose word outlives the certificate."""

    @model_validator(mode="after")
    def _whole(self) -> "Provenance":
        if (self.certificates is None) != (self.key is None):
            raise ValueError("certificates and key go together; give both")
        return self
