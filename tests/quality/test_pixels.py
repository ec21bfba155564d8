"""Measures of pixels, against scipy's transform and against pictures whose answer is known."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import fft

from rayjobs.quality import pixels as quality
from rayjobs.quality.duplicates import groups, pack
from rayjobs.quality.pixels import Signature, measure
from rayjobs.starter import world

Make = Callable[[int], Image.Image]


def signature(image: Image.Image) -> Signature:
    measured = measure(image)
    return Signature(measured["phash"], measured["colours"])


def drawn(scene: world.Scene, seed: int = 0, side: int = 128) -> Image.Image:
    return Image.fromarray(world.draw(scene, np.random.default_rng(seed), side))


def dithered(level: int, side: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-1, 2, (side, side, 3))
    return Image.fromarray((level + noise).astype(np.uint8))


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).integers(-1, 2, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("side", [64, 1024])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_one_colour_is_blank(side: int, level: int) -> None:
    assert measure(Image.new("RGB", (side, side), (level, 30, 200)))["blank"] is True
    assert measure(dithered(min(max(level, 1), 254), side))["blank"] is True


@pytest.mark.parametrize("side", [64, 1024])
def test_a_small_object_on_a_plain_ground_is_not_blank(side: int) -> None:
    image = Image.new("RGB", (side, side), (10, 10, 10))
    image.paste((10, 10, 60), (0, 0, side // 32, side // 32))
    assert measure(image)["blank"] is False


def test_no_scene_of_the_starter_model_is_blank() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert not measure(Image.fromarray(world.draw(world.random_scene(rng), rng)))["blank"]


def test_sharpness_compares_between_sizes() -> None:
    coarse = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    large = Image.fromarray(coarse).resize((1024, 1024), Image.Resampling.BICUBIC)
    images = [large.resize((side, side), Image.Resampling.LANCZOS) for side in (256, 512, 1024)]
    values = [measure(image)["sharpness"] for image in images]
    assert values == pytest.approx([values[1]] * 3, rel=0.1)
    star = world.Scene("red", "circle", "white")
    small, large = (measure(drawn(star, 0, side))["sharpness"] for side in (512, 1024))
    assert small == pytest.approx(large, rel=0.15)


def test_sharpness_is_the_variance_of_the_laplacian(picture: Make) -> None:
    image = picture(2).resize((512, 512)).convert("L")
    pixels = np.asarray(image, np.float64)
    edges = (
        pixels[:-2, 1:-1]
        + pixels[2:, 1:-1]
        + pixels[1:-1, :-2]
        + pixels[1:-1, 2:]
        - 4 * pixels[1:-1, 1:-1]
    )
    assert measure(image)["sharpness"] == pytest.approx(edges.var(), rel=1e-6)


def test_a_blurred_picture_is_less_sharp() -> None:
    image = drawn(world.Scene("red", "star", "white", pattern="striped"), side=512)
    blurred = image.resize((64, 64)).resize((512, 512), Image.Resampling.BICUBIC)
    assert measure(blurred)["sharpness"] < 0.3 * measure(image)["sharpness"]
    assert measure(Image.new("RGB", (64, 64), (9, 9, 9)))["sharpness"] == 0


@pytest.mark.parametrize("size", [(64, 64), (200, 120), (1024, 1024)])
def test_phash_is_the_usual_one(picture: Make, size: tuple[int, int]) -> None:
    for number in range(10):
        image = picture(number).resize(size)
        small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        low = fft.dct(fft.dct(np.asarray(small, np.float64), axis=0), axis=1)[:8, :8]
        bits = "".join(str(int(bit)) for bit in (low > np.median(low)).ravel())
        assert measure(image)["phash"] == f"{int(bits, 2):016x}"


def test_zero_coefficients_are_false_bits_not_noise() -> None:
    step = np.zeros((32, 32), np.uint8)
    step[:, 16:] = 200
    assert bytes.fromhex(measure(Image.fromarray(step))["phash"])[1:] == bytes(7)


def test_colours_are_those_of_the_cells() -> None:
    image = Image.new("RGB", (90, 60), (255, 0, 0))
    image.paste((0, 128, 255), (30, 20, 60, 40))
    assert measure(image)["colours"] == "ff0000" * 4 + "0080ff" + "ff0000" * 4


def test_measures_take_any_mode_and_repeat(picture: Make) -> None:
    image = picture(3)
    assert measure(image) == measure(image.copy())
    for mode in ("L", "RGBA", "P"):
        assert set(measure(image.convert(mode))) == {"blank", "sharpness", "phash", "colours"}


def look_alike(a: Signature, b: Signature) -> bool:
    return bool(groups(pack([a, b]))[1] == 0)


def test_a_copy_stored_again_looks_alike() -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        image = drawn(world.random_scene(rng), int(rng.integers(99)))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        for other in (Image.open(file), image.resize((256, 256)), noisy(image)):
            assert look_alike(signature(image), signature(other))


def test_colour_and_shape_tell_pictures_apart() -> None:
    red, blue = (drawn(world.Scene(c, "star", "white")) for c in ("red", "blue"))
    hashes = [int(signature(image).phash, 16) for image in (red, blue)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= quality.ALIKE_BITS
    assert not look_alike(signature(red), signature(blue))
    heart = drawn(world.Scene("red", "heart", "white"))
    assert not look_alike(signature(red), signature(heart))


def test_different_scenes_hardly_ever_look_alike() -> None:
    rng = np.random.default_rng(5)
    signatures = [signature(drawn(world.random_scene(rng), n, 64)) for n in range(150)]
    firsts = groups(pack(signatures))
    assert sum(firsts != np.arange(len(signatures))) <= 1
