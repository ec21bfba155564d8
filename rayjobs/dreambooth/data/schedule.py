"""What every step trains on, as a function of the step's number.

Owns the order of pictures, their frames and the random numbers of each row. A step is the same on
one worker or eight, and after any interruption: nothing here remembers anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rayjobs.dreambooth.config import TrainConfig
from rayjobs.dreambooth.data import bucketing, rng
from rayjobs.dreambooth.data.bucketing import Frame
from rayjobs.dreambooth.data.photos import Photo


@dataclass(frozen=True)
class View:
    """A picture as it is trained on: one of its frames, with its caption."""

    photo: Photo
    frame: Frame
    is_prior: bool

    @property
    def name(self) -> str:
        """What its encoding may be kept under, together with the autoencoder's own name."""
        seen = self.frame
        box = (*seen.scaled, seen.left, seen.top, seen.width, seen.height, int(seen.mirrored))
        return f"{self.photo.sha256}-{'-'.join(str(number) for number in box)}"


@dataclass(frozen=True)
class Row:
    """One row of a step: what is shown, and the name of its random numbers."""

    view: View
    caption: str | None
    """None: trained without its text."""
    chance: float
    """In [0, 1): decides the noise level."""
    stream: tuple[int | str, ...]

    def noise(self, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Standard normal numbers for this row alone, float32 on the CPU."""
        return rng.normal(shape, *self.stream, purpose)

    @property
    def dropout_key(self) -> int:
        return rng.key(*self.stream, "dropout")


class Curriculum:
    """The rows of every step: `global_batch_size` photographs, and a class image with each."""

    def __init__(
        self,
        config: TrainConfig,
        photos: Sequence[Photo],
        class_images: Sequence[Photo],
        side: int,
        vae_scale: int,
    ):
        self.config = config
        self.photos, self.class_images = photos, class_images
        multiple = bucketing.bucket_multiple(side, vae_scale)
        self._buckets = bucketing.list_buckets(side, multiple) if config.buckets else [(side, side)]

    @property
    def num_instance(self) -> int:
        return self.config.global_batch_size

    @property
    def num_prior(self) -> int:
        return self.config.global_batch_size if self.class_images else 0

    def rows(self, step: int, rank: int = 0, num_workers: int = 1) -> list[Row]:
        """What a worker trains on in a step: every num_workers-th photograph, with its prior."""
        found = []
        for position in range(rank, self.config.global_batch_size, num_workers):
            found.append(self._row(step, position, self.photos, False))
            if self.class_images:
                found.append(self._row(step, position, self.class_images, True))
        return found

    def views(self) -> Iterator[View]:
        """Every view that any step may show; two crops of a picture may be the same."""
        for pictures, is_prior in ((self.photos, False), (self.class_images, True)):
            for photo in pictures:
                bucket = bucketing.nearest_bucket(photo, self._buckets)
                crops = bucketing.num_crops(photo, bucket, self.config.crops)
                for crop in range(crops):
                    for mirrored in (False, True) if self.config.flip else (False,):
                        yield self._view(photo, crop, mirrored, is_prior)

    def captions(self) -> list[str]:
        """Every caption, each once."""
        every = [*self.photos, *self.class_images]
        return sorted({caption for photo in every for caption in photo.captions})

    def _row(self, step: int, position: int, pictures: Sequence[Photo], is_prior: bool) -> Row:
        seed, kind = self.config.seed, "prior" if is_prior else "instance"
        number = step * self.config.global_batch_size + position
        epoch, place = divmod(number, len(pictures))
        photo = pictures[rng.permutation(len(pictures), seed, epoch, kind, "order")[place]]
        stream = (seed, step, position, kind)
        bucket = bucketing.nearest_bucket(photo, self._buckets)
        crops = bucketing.num_crops(photo, bucket, self.config.crops)
        crop = int(rng.uniform(*stream, "crop") * crops)
        mirrored = self.config.flip and rng.uniform(*stream, "flip") < 0.5
        dropped = rng.uniform(*stream, "caption dropout") < self.config.caption_dropout
        view = self._view(photo, crop, mirrored, is_prior)
        said = int(rng.uniform(*stream, "caption choice") * len(photo.captions))
        caption = None if dropped else photo.captions[said]
        return Row(view, caption, rng.uniform(*stream, "level"), stream)

    def _view(self, photo: Photo, crop: int, mirrored: bool, is_prior: bool) -> View:
        bucket = bucketing.nearest_bucket(photo, self._buckets)
        seen = bucketing.frame(photo, bucket, crop, mirrored, self.config.seed)
        return View(photo, seen, is_prior)


def micro_batches(rows: list[Row], most: int | None) -> list[list[Row]]:
    """Rows that can share a call: of one size, at most `most` photographs with their priors."""
    by_size: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        by_size.setdefault((row.view.frame.width, row.view.frame.height), []).append(row)
    parts = []
    for same in by_size.values():
        paired = any(row.view.is_prior for row in same) and len(by_size) == 1
        size = len(same) if most is None else most * (2 if paired else 1)
        parts += [same[first : first + size] for first in range(0, len(same), size)]
    return parts
