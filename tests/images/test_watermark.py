"""Marks outlive what is done to files, are not seen, and depend on picture and id alone."""

import hashlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from rayjobs.images import watermark

IMAGE_ID = hashlib.sha256(b"a picture").hexdigest()


def clouds(seed: int, side: int) -> Image.Image:
    """Noise of every scale, as photographs have; of every third seed black and white in parts."""
    rng, pixels = np.random.default_rng(seed), np.zeros((side, side, 3))
    for octave in range(1, 8):
        grains = rng.uniform(-1, 1, (2**octave, 2**octave, 3)) * 2.0**-octave
        layers = [Image.fromarray(grains[..., c].astype(np.float32)) for c in range(3)]
        layers = [layer.resize((side, side), Image.Resampling.BICUBIC) for layer in layers]
        pixels += np.stack([np.asarray(layer) for layer in layers], -1)
    gain = 600 if seed % 3 == 0 else 150
    return Image.fromarray((128 + gain * pixels).clip(0, 255).astype(np.uint8))


def saved(**options: object) -> Callable[[Image.Image], Image.Image]:
    def attack(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, **options)  # type: ignore[arg-type]
        return Image.open(file)

    return attack


def scaled(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize((round(image.width * share), round(image.height * share)))


ATTACKS = [
    saved(format="PNG"),
    saved(format="WEBP", quality=90),
    saved(format="JPEG", quality=85),
    scaled(0.9),
    scaled(1.1),
    lambda image: saved(format="JPEG", quality=85)(scaled(0.9)(image)),
]


@pytest.mark.parametrize("seed", range(4))
def test_a_mark_outlives_files_and_scaling_and_is_not_seen(seed: int) -> None:
    image = clouds(seed, 512)
    assert watermark.read(image) is None
    marked = watermark.mark(image, IMAGE_ID)
    assert [watermark.read(attack(marked)) for attack in ATTACKS] == [IMAGE_ID[:16]] * len(ATTACKS)
    change = np.asarray(marked, float) - np.asarray(image, float)
    assert 10 * np.log10(255**2 / (change**2).mean()) > 43
    assert watermark.mark(image, IMAGE_ID) == marked


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("size", [(512, 384), (64, 64)])
def test_a_plain_picture_takes_a_mark(size: tuple[int, int], level: int) -> None:
    marked = watermark.mark(Image.new("RGB", size, (level,) * 3), IMAGE_ID)
    assert watermark.read(marked) == IMAGE_ID[:16]
    assert watermark.mark(marked, IMAGE_ID) == marked


def test_a_cropped_picture_has_none() -> None:
    assert watermark.read(watermark.mark(clouds(1, 256), IMAGE_ID).crop((9, 0, 256, 256))) is None
