"""The batch schedule: what every step trains on, as a function of the step's number.

Owns the order of images, their crops and the random numbers of each row. Keeps no state, so a step
is the same on one worker or eight, and after any interruption.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rayjobs.dreambooth.config import TrainConfig
from rayjobs.dreambooth.data import bucketing, rng
from rayjobs.dreambooth.data.bucketing import Frame
from rayjobs.dreambooth.data.photos import Photo, Subject

T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """An image as it is trained on: one of its crops."""

    photo: Photo
    frame: Frame
    is_prior: bool

    @property
    def name(self) -> str:
        """The cache's name of its encoding, unique for one autoencoder."""
        frame = self.frame
        box = (*frame.scaled, frame.left, frame.top, frame.width, frame.height, int(frame.mirrored))
        return f"{self.photo.sha256}-{'-'.join(str(number) for number in box)}"


@dataclass(frozen=True)
class Row:
    """One row of a step: the view, its caption, and its source of random numbers."""

    view: View
    caption: str | None
    """None: trained without its text."""
    quantile: float
    """In [0, 1): decides the noise level."""
    stream: tuple[int | str, ...]
    """The key of the row's random numbers."""

    def noise(self, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Standard normal numbers for this row alone, float32 on the CPU."""
        return rng.normal(shape, *self.stream, purpose)

    @property
    def dropout_key(self) -> int:
        return rng.key(*self.stream, "dropout")


class BatchSchedule:
    """The rows of every step: `global_batch_size` photographs, and a class image with each."""

    def __init__(
        self,
        config: TrainConfig,
        subjects: Sequence[Subject],
        side: int,
        vae_scale: int,
    ):
        self.config = config
        self.class_images = [subject.class_images for subject in subjects]
        self.photos = [
            (photo, number)
            for number, subject in enumerate(subjects)
            for photo in subject.photos
            for _ in range(subject.repeats)
        ]
        """Each as often as it comes up in an epoch, with the number of its subject."""
        multiple = bucketing.bucket_multiple(side, vae_scale)
        self._buckets = bucketing.list_buckets(side, multiple) if config.buckets else [(side, side)]

    @property
    def num_instance(self) -> int:
        return self.config.global_batch_size

    @property
    def num_prior(self) -> int:
        return self.config.global_batch_size if any(self.class_images) else 0

    def rows(self, step: int, rank: int = 0, num_workers: int = 1) -> list[Row]:
        """A worker's rows of a step: every num_workers-th photograph, each with a class image."""
        rows = []
        for position in range(rank, self.config.global_batch_size, num_workers):
            photo, subject = self._pick(step, position, "instance", self.photos)
            rows.append(self._row(step, position, photo, False))
            if images := self.class_images[subject]:
                image = self._pick(step, position, "prior", images)
                rows.append(self._row(step, position, image, True))
        return rows

    def fixed_rows(self, photos: Sequence[Photo], num_levels: int) -> list[Row]:
        """Each photograph's centre at evenly spaced levels, with the same noise every time."""
        rows = []
        for photo in photos:
            view = self._view(photo, 0, False, False)
            for level in range(num_levels):
                stream = (self.config.seed, "validation", photo.sha256, level)
                rows.append(Row(view, photo.captions[0], (level + 0.5) / num_levels, stream))
        return rows

    def views(self) -> Iterator[View]:
        """Every view that any step may use; two crops of an image may be the same."""
        for photos, is_prior in zip(self._pictures(), (False, True), strict=True):
            for photo in photos:
                bucket = bucketing.nearest_bucket(photo, self._buckets)
                crops = bucketing.num_crops(photo, bucket, self.config.crops)
                for crop in range(crops):
                    for mirrored in (False, True) if self.config.flip else (False,):
                        yield self._view(photo, crop, mirrored, is_prior)

    def captions(self) -> list[str]:
        """Every caption, each once."""
        every = [photo for photos in self._pictures() for photo in photos]
        return sorted({caption for photo in every for caption in photo.captions})

    def _pictures(self) -> tuple[list[Photo], list[Photo]]:
        """Photographs and class images, each once."""
        of_class = [image for images in self.class_images for image in images]
        photos = [photo for photo, _ in self.photos]
        return list(dict.fromkeys(photos)), list(dict.fromkeys(of_class))

    def _pick(self, step: int, position: int, kind: str, pictures: Sequence[T]) -> T:
        """The picture of a place in the order of an epoch, in which each comes up once."""
        number = step * self.config.global_batch_size + position
        epoch, index = divmod(number, len(pictures))
        order = rng.permutation(len(pictures), self.config.seed, epoch, kind, "order")
        return pictures[order[index]]

    def _row(self, step: int, position: int, photo: Photo, is_prior: bool) -> Row:
        seed, kind = self.config.seed, "prior" if is_prior else "instance"
        stream = (seed, step, position, kind)
        bucket = bucketing.nearest_bucket(photo, self._buckets)
        crops = bucketing.num_crops(photo, bucket, self.config.crops)
        crop = int(rng.uniform(*stream, "crop") * crops)
        mirrored = self.config.flip and rng.uniform(*stream, "flip") < 0.5
        dropped = rng.uniform(*stream, "caption dropout") < self.config.caption_dropout
        view = self._view(photo, crop, mirrored, is_prior)
        choice = int(rng.uniform(*stream, "caption choice") * len(photo.captions))
        caption = None if dropped else self._said(photo.captions[choice], stream, is_prior)
        return Row(view, caption, rng.uniform(*stream, "level"), stream)

    def _said(self, caption: str, stream: tuple[int | str, ...], is_prior: bool) -> str:
        """A photograph's caption with its tags in this row's order, some of them left out."""
        config = self.config
        if is_prior or not (config.shuffle_tags or config.tag_dropout):
            return caption
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        kept, others = tags[: config.keep_tags], tags[config.keep_tags :]
        order = range(len(others))
        if config.shuffle_tags:
            order = rng.permutation(len(others), *stream, "tags")
        said = [
            others[number]
            for number in order
            if rng.uniform(*stream, "tag dropout", number) >= config.tag_dropout
        ]
        return ", ".join([*kept, *said])

    def _view(self, photo: Photo, crop: int, mirrored: bool, is_prior: bool) -> View:
        bucket = bucketing.nearest_bucket(photo, self._buckets)
        frame = bucketing.frame(photo, bucket, crop, mirrored, self.config.seed)
        return View(photo, frame, is_prior)


def micro_batches(rows: list[Row], max_photos: int | None) -> list[list[Row]]:
    """Rows that share a forward pass: of one size, so many photographs with their class images."""
    by_size: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        by_size.setdefault((row.view.frame.width, row.view.frame.height), []).append(row)
    parts = []
    for same in by_size.values():
        paired = any(row.view.is_prior for row in same) and len(by_size) == 1
        size = len(same) if max_photos is None else max_photos * (2 if paired else 1)
        parts += [same[first : first + size] for first in range(0, len(same), size)]
    return parts
