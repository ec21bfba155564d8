"""Content credentials by the library's own reader: valid, trusted, altered, stripped."""

from dataclasses import replace

import pytest
from PIL import Image

from rayjobs.images.credentials import BadKey, Found, Signing, read_credentials
from rayjobs.images.encode import EXTENSION, encode_picture
from tests.chain import make_chain

CHAIN = make_chain()
SIGNING = Signing(CHAIN.certificates, CHAIN.key)
RECORD = {"image_id": "ab" * 32, "model": "starter"}


@pytest.mark.parametrize("image_format", EXTENSION)
def test_what_was_signed_is_read_and_an_altered_picture_is_known(image_format: str) -> None:
    extension = EXTENSION[image_format]
    data = encode_picture(Image.effect_noise((96, 96), 60).convert("RGB"), image_format, 90)
    signed = SIGNING.sign(data, extension, RECORD)
    expected = Found("operator", is_valid=True, is_trusted=False, faults=(), record=RECORD)
    assert read_credentials(signed, extension) == expected
    trusted = replace(expected, is_trusted=True)
    assert read_credentials(signed, extension, CHAIN.issuer) == trusted
    assert read_credentials(data, extension) is None
    at = signed.index(data[len(data) // 2 :][:32]) + 16
    altered = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
    found = read_credentials(altered, extension)
    assert found is not None
    assert (found.is_valid, found.faults) == (False, ("assertion.dataHash.mismatch",))


@pytest.mark.parametrize(
    ("signing", "named"),
    [
        (replace(SIGNING, key=make_chain().key), "signature does not match"),
        (replace(SIGNING, key=b"no key"), "is no private key in PEM"),
        (replace(SIGNING, certificates=b"none"), "cannot sign"),
    ],
)
def test_a_key_that_does_not_fit_is_told(signing: Signing, named: str) -> None:
    data = encode_picture(Image.new("RGB", (8, 8)), "png", 90)
    with pytest.raises(BadKey, match=named):
        signing.sign(data, "png", RECORD)
