"""Shapes and crops: buckets fit the model, frames lie inside pictures, SDXL is told the truth."""

import numpy as np
import pytest
import torch
from PIL import Image

from rayjobs.dreambooth.data import bucketing
from rayjobs.dreambooth.data.bucketing import Frame
from rayjobs.dreambooth.data.photos import Photo


def photo(width: int, height: int, number: int = 0) -> Photo:
    return Photo(
        f"{number}.png", "x", f"{number}.png", None, ("x",), f"{number:064x}", width, height
    )


def random_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    drawn = np.exp(np.random.default_rng(seed).uniform(np.log(20), np.log(9000), (count, 2)))
    return [(int(width), int(height)) for width, height in drawn]


def gradient(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("side", "scale", "multiple"),
    [(1024, 8, 64), (768, 8, 48), (512, 8, 32), (256, 8, 16), (64, 8, 16), (64, 4, 8)],
)
def test_buckets_fit_the_model(side: int, scale: int, multiple: int) -> None:
    assert bucketing.bucket_multiple(side, scale) == multiple
    buckets = bucketing.list_buckets(side, multiple)
    assert (side, side) in buckets
    assert len(buckets) == len(set(buckets)) > 2
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % multiple == height % multiple == 0
        assert side * side // 2 < width * height <= side * side
        assert max(width, height) <= 2 * min(width, height)


@pytest.mark.parametrize("scale", [4, 8])
def test_buckets_of_any_side_are_whole_latents(scale: int) -> None:
    for side in range(8, 1200, 8):
        for width, height in bucketing.list_buckets(side, bucketing.bucket_multiple(side, scale)):
            assert width % scale == height % scale == 0
            assert width * height <= side * side
            assert max(width, height) <= 2 * min(width, height)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1024, 1024), (1024, 1024)),
        ((50, 50), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((1408, 704), (1408, 704)),
        ((9000, 900), (1408, 704)),
        ((900, 9000), (704, 1408)),
    ],
)
def test_the_bucket_is_the_nearest_in_shape(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert bucketing.nearest_bucket(photo(*size), bucketing.list_buckets(1024, 64)) == bucket


def test_no_other_bucket_cuts_less_off() -> None:
    buckets = bucketing.list_buckets(1024, 64)
    for width, height in random_sizes(300):

        def kept(bucket: tuple[int, int], shape: float = width / height) -> float:
            other = bucket[0] / bucket[1]
            return min(shape, other) / max(shape, other)

        nearest = bucketing.nearest_bucket(photo(width, height), buckets)
        assert kept(nearest) == pytest.approx(max(map(kept, buckets)))


def test_frames_lie_inside_the_scaled_picture() -> None:
    buckets = bucketing.list_buckets(512, 32)
    for number, (width, height) in enumerate(random_sizes(300)):
        shown = photo(width, height, number)
        bucket = bucketing.nearest_bucket(shown, buckets)
        for crop in range(4):
            seen = bucketing.frame(shown, bucket, crop, mirrored=False, seed=7)
            assert (seen.width, seen.height) == bucket
            assert 0 <= seen.left <= seen.scaled[0] - seen.width
            assert 0 <= seen.top <= seen.scaled[1] - seen.height
            assert seen.scaled[0] == seen.width or seen.scaled[1] == seen.height
            scale = max(bucket[0] / width, bucket[1] / height)
            assert seen.scaled == pytest.approx((width * scale, height * scale), abs=0.501)


def test_the_first_crop_is_the_middle() -> None:
    wide = bucketing.frame(photo(300, 100), (100, 100), 0, mirrored=False, seed=0)
    assert wide == Frame(100, 100, (300, 100), left=100, top=0, mirrored=False)
    tall = bucketing.frame(photo(100, 401), (50, 50), 0, mirrored=True, seed=0)
    assert tall == Frame(50, 50, (50, 200), left=0, top=75, mirrored=True)
    assert bucketing.frame(photo(300, 100), (100, 100), 0, mirrored=False, seed=9) == wide


def test_other_crops_are_drawn_over_all_of_the_picture() -> None:
    shown = photo(300, 100)
    lefts = [bucketing.frame(shown, (100, 100), crop, False, seed=0).left for crop in range(1, 400)]
    assert (min(lefts), max(lefts)) == (
        pytest.approx(0, abs=8),
        pytest.approx(200, abs=8),
    )
    assert np.mean(lefts) == pytest.approx(100, abs=12)
    again = [bucketing.frame(shown, (100, 100), crop, False, seed=0).left for crop in range(1, 400)]
    assert again == lefts
    for other in (
        bucketing.frame(shown, (100, 100), 1, False, seed=1),
        bucketing.frame(photo(300, 100, 1), (100, 100), 1, False, seed=0),
    ):
        assert other.left != lefts[0]


@pytest.mark.parametrize(
    ("size", "most", "count"),
    [((100, 100), 4, 1), ((101, 100), 4, 2), ((300, 100), 4, 4), ((300, 100), 1, 1)],
)
def test_crops_are_counted_where_there_is_a_choice(
    size: tuple[int, int], most: int, count: int
) -> None:
    assert bucketing.num_crops(photo(*size), (100, 100), most) == count


def test_a_cut_shows_what_the_frame_says() -> None:
    seen = Frame(20, 10, (60, 40), left=30, top=5, mirrored=False)
    pixels = np.asarray(seen.cut(gradient(60, 40)))
    assert pixels.shape == (10, 20, 3)
    assert pixels[0, :, 0].tolist() == list(range(30, 50))
    assert pixels[:, 0, 1].tolist() == list(range(5, 15))
    mirrored = Frame(20, 10, (60, 40), left=30, top=5, mirrored=True)
    assert (np.asarray(mirrored.cut(gradient(60, 40))) == pixels[:, ::-1]).all()


def test_a_cut_is_scaled_first() -> None:
    seen = bucketing.frame(photo(240, 120), (60, 60), 0, mirrored=False, seed=0)
    pixels = np.asarray(seen.cut(gradient(240, 120))).astype(float)
    assert pixels.shape == (60, 60, 3)
    assert pixels[30, 30, :2].tolist() == pytest.approx([120.5, 60.5], abs=1.5)
    assert pixels[30, 59, 0] == pytest.approx(60 + 2 * 59, abs=3)


def test_sdxl_is_told_heights_first() -> None:
    shown = photo(400, 300)
    seen = Frame(80, 64, (100, 75), left=3, top=7, mirrored=False)
    assert bucketing.time_ids(shown, seen) == [300, 400, 7, 3, 64, 80]


def test_sdxl_is_told_of_the_crop_in_the_mirrored_picture() -> None:
    image = gradient(100, 75)
    seen = Frame(80, 64, (100, 75), left=3, top=7, mirrored=True)
    _, _, top, left, height, width = map(int, bucketing.time_ids(photo(100, 75), seen))
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut = mirrored.crop((left, top, left + width, top + height))
    assert seen.cut(image).tobytes() == cut.tobytes()


def test_pixels_are_between_minus_one_and_one() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    image.putpixel((2, 0), (255, 255, 255))
    pixels = bucketing.to_pixels(image)
    assert (pixels.shape, pixels.dtype) == ((3, 2, 3), torch.float32)
    assert pixels[:, 1, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert pixels[0].tolist() == [[-1, -1, 1], [-1, -1, -1]]
