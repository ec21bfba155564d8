"""Aspect-ratio bucketing: the size that an image is trained at, its crop, SDXL's size conditioning.

Owns shapes and crops. Knows nothing of latents or batches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from rayjobs.dreambooth.data import rng
from rayjobs.dreambooth.data.photos import Photo

MAX_ASPECT_RATIO = 2.0
"""A bucket's longer side over its shorter one."""


@dataclass(frozen=True)
class Frame:
    """A crop of an image: scaled, cut to width x height, and perhaps mirrored."""

    width: int
    height: int
    scaled: tuple[int, int]
    """Width and height before the crop."""
    left: int
    top: int
    mirrored: bool

    def cut(self, image: Image.Image) -> Image.Image:
        scaled = image
        if image.size != self.scaled:
            scaled = image.resize(self.scaled, Image.Resampling.LANCZOS)
        box = (self.left, self.top, self.left + self.width, self.top + self.height)
        cut = scaled.crop(box)
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else cut


def list_buckets(side: int, multiple: int) -> list[tuple[int, int]]:
    """Sizes (width, height) of about side x side pixels, in steps of `multiple`."""
    sizes = {(side, side)}
    width = multiple
    while width <= side * MAX_ASPECT_RATIO**0.5:
        height = int(side * side / width / multiple) * multiple
        if height and max(width / height, height / width) <= MAX_ASPECT_RATIO:
            sizes |= {(width, height), (height, width)}
        width += multiple
    return sorted(sizes)


def bucket_multiple(side: int, vae_scale: int) -> int:
    """64 pixels at 1024, less at smaller sizes, always a whole number of latents."""
    return max(2, side // 16 // vae_scale) * vae_scale


def nearest_bucket(photo: Photo, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket that crops least."""
    shape = np.log(photo.width / photo.height)
    return min(buckets, key=lambda size: abs(np.log(size[0] / size[1]) - shape))


def frame(photo: Photo, bucket: tuple[int, int], crop: int, mirrored: bool, seed: int) -> Frame:
    """The `crop`-th frame of an image: the centre first, then random ones."""
    width, height = bucket
    scale = max(width / photo.width, height / photo.height)
    scaled = (max(width, round(photo.width * scale)), max(height, round(photo.height * scale)))
    spare_x, spare_y = scaled[0] - width, scaled[1] - height
    if crop == 0:
        left, top = spare_x // 2, spare_y // 2
    else:
        left = int(rng.uniform(seed, photo.sha256, crop, "left") * (spare_x + 1))
        top = int(rng.uniform(seed, photo.sha256, crop, "top") * (spare_y + 1))
    return Frame(width, height, scaled, left, top, mirrored)


def num_crops(photo: Photo, bucket: tuple[int, int], limit: int) -> int:
    """How many different crops an image has, at most `limit`."""
    whole = frame(photo, bucket, 0, False, 0)
    spare = max(whole.scaled[0] - whole.width, whole.scaled[1] - whole.height)
    return min(limit, spare + 1)


def time_ids(photo: Photo, frame: Frame) -> list[float]:
    """SDXL's six numbers: the image's own size, the crop's corner, the size trained at."""
    left = frame.scaled[0] - frame.width - frame.left if frame.mirrored else frame.left
    return [photo.height, photo.width, frame.top, left, frame.height, frame.width]


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in -1..1."""
    values = torch.from_numpy(np.asarray(image, np.uint8).copy())
    return values.permute(2, 0, 1).float() / 127.5 - 1
