"""A step's rows are a function of its number: on any number of workers, at any time."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from rayjobs.dreambooth.config import TrainConfig
from rayjobs.dreambooth.data.photos import Photo, Subject
from rayjobs.dreambooth.data.schedule import BatchSchedule, Row, micro_batches

SIZES = [(64, 64), (120, 80), (80, 120), (300, 100), (65, 64), (640, 480), (90, 90)]


def photos(count: int, kind: str = "photo") -> list[Photo]:
    made = []
    for number in range(count):
        name, size = f"{kind} {number}", SIZES[number % len(SIZES)]
        made.append(Photo(f"{name}.png", "x", "x.png", None, (name,), f"hash of {name}", *size))
    return made


def subject(pictures: list[Photo], images: tuple[Photo, ...], repeats: int = 1) -> Subject:
    return Subject("a sks dog", "a dog", tuple(pictures), "x", False, images, repeats)


def schedule(
    *, pictures: list[Photo] | None = None, priors: int = 5, **train: Any
) -> BatchSchedule:
    config = TrainConfig(**{"global_batch_size": 4, "seed": 3, **train})
    images = tuple(photos(priors, "prior"))
    return BatchSchedule(config, [subject(pictures or photos(7), images)], 64, 8)


def mixed(step: int, made: BatchSchedule) -> tuple[list[Row], list[Row]]:
    rows = made.rows(step)
    return [r for r in rows if not r.view.is_prior], [r for r in rows if r.view.is_prior]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("priors", [0, 5])
def test_workers_share_the_rows_of_one(num_workers: int, priors: int) -> None:
    made = schedule(priors=priors, caption_dropout=0.3, flip=True)
    for step in range(20):
        alone = {row.stream: row for row in made.rows(step)}
        shares = [made.rows(step, rank, num_workers) for rank in range(num_workers)]
        together = [row for share in shares for row in share]
        assert len(together) == len(alone) == 4 * (2 if priors else 1)
        assert {row.stream: row for row in together} == alone
        if num_workers != 3:
            assert len({len(share) for share in shares}) == 1


def test_several_subjects_come_up_as_often_as_they_repeat() -> None:
    """Each photograph with an image of its own class; every epoch has each as often as it says."""
    dogs, cats = photos(3, "dog"), photos(2, "cat")
    of_dogs, of_cats = tuple(photos(4, "any dog")), tuple(photos(6, "any cat"))
    subjects = [subject(dogs, of_dogs), subject(cats, of_cats, repeats=3)]
    made = BatchSchedule(TrainConfig(global_batch_size=9, seed=3), subjects, 64, 8)
    for step in range(5):  # an epoch is a step
        rows = made.rows(step)
        seen = Counter(row.view.photo.name for row in rows if not row.view.is_prior)
        assert seen == {"dog 0.png": 1, "dog 1.png": 1, "dog 2.png": 1, "cat 0.png": 3} | {
            "cat 1.png": 3
        }
        for photo, image in zip(rows[::2], rows[1::2], strict=True):
            assert image.view.photo.name.startswith(f"any {photo.view.photo.name[:3]}")
    images = {row.view.photo for step in range(40) for row in made.rows(step) if row.view.is_prior}
    assert images == {*of_dogs, *of_cats}
    assert {view.photo for view in made.views()} == {*dogs, *cats, *images}
    alone = BatchSchedule(TrainConfig(global_batch_size=4), subjects[:1], 64, 8)
    assert alone.rows(7) == BatchSchedule(alone.config, [subject(dogs, of_dogs)], 64, 8).rows(7)


def test_rows_of_all_workers_draw_the_noise_of_one() -> None:
    made = schedule()
    alone = {row.stream: row for row in made.rows(11)}
    for rank in range(4):
        for row in made.rows(11, rank, 4):
            other = alone[row.stream]
            assert torch.equal(row.noise((4, 8, 8), "noise"), other.noise((4, 8, 8), "noise"))
            assert row.dropout_key == other.dropout_key


def test_every_photograph_comes_with_a_class_image() -> None:
    made = schedule()
    assert (made.num_instance, made.num_prior) == (4, 4)
    for rank in range(2):
        assert [row.view.is_prior for row in made.rows(5, rank, 2)] == [False, True] * 2
    without = schedule(priors=0)
    assert (without.num_instance, without.num_prior) == (4, 0)
    assert [row.view.is_prior for row in without.rows(5)] == [False] * 4


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_an_epoch_shows_every_picture_once(batch_size: int) -> None:
    made = schedule(global_batch_size=batch_size)
    shown: tuple[list[str], list[str]] = ([], [])
    for step in range(1 + 70 // batch_size):
        for names, rows in zip(shown, mixed(step, made), strict=True):
            names += [row.view.photo.name for row in rows]
    for names, count in zip(shown, (7, 5), strict=True):
        epochs = [tuple(names[first : first + count]) for first in range(0, 70, count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
        assert len(set(epochs)) > 5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("crops", [1, 4])
def test_what_is_shown_was_announced(flip: bool, buckets: bool, crops: int) -> None:
    made = schedule(flip=flip, buckets=buckets, crops=crops)
    announced = {view.name: view for view in made.views()}
    shown = {row.view.name: row.view for step in range(50) for row in made.rows(step)}
    assert shown.keys() <= announced.keys()
    assert all(announced[name] == view for name, view in shown.items())
    assert {view.photo.name for view in shown.values()} == {
        view.photo.name for view in announced.values()
    }
    assert {view.frame.mirrored for view in shown.values()} == ({False, True} if flip else {False})
    sizes = {(view.frame.width, view.frame.height) for view in announced.values()}
    assert sizes == ({(64, 64), (80, 48), (48, 80)} if buckets else {(64, 64)})


def test_every_view_is_shown_sooner_or_later() -> None:
    made = schedule(flip=True)
    shown = {row.view.name for step in range(400) for row in made.rows(step)}
    assert shown == {view.name for view in made.views()}


def test_views_have_names_of_their_own() -> None:
    made = schedule(flip=True)
    facts = {(view.photo.sha256, view.frame) for view in made.views()}
    assert len({view.name for view in made.views()}) == len(facts)


def test_a_step_is_always_the_same() -> None:
    made, again = schedule(caption_dropout=0.3), schedule(caption_dropout=0.3)
    later = [made.rows(step) for step in range(20)]
    assert [again.rows(step) for step in reversed(range(20))] == later[::-1]
    assert made.rows(7) == later[7]
    for row, same in zip(later[7], again.rows(7), strict=True):
        assert torch.equal(row.noise((4, 8, 8), "noise"), same.noise((4, 8, 8), "noise"))


def test_seeds_and_steps_and_purposes_differ() -> None:
    made, other = schedule(), schedule(seed=4)
    rows = [*made.rows(0), *made.rows(1), *other.rows(0), *other.rows(1)]
    noises = [row.noise((4, 8, 8), purpose) for row in rows for purpose in ("noise", "offset")]
    correlations = torch.corrcoef(torch.stack(noises).flatten(1)) - torch.eye(len(noises))
    assert correlations.abs().max() < 0.35
    assert (
        len({row.quantile for row in rows}) == len({row.dropout_key for row in rows}) == len(rows)
    )
    orders = [
        [row.view.photo.name for step in range(20) for row in one.rows(step)]
        for one in (made, other)
    ]
    assert orders[0] != orders[1]


def test_noise_levels_are_uniform() -> None:
    made = schedule()
    quantiles = torch.tensor([row.quantile for step in range(500) for row in made.rows(step)])
    assert 0 <= quantiles.min() < 0.01
    assert 0.99 < quantiles.max() < 1
    assert quantiles.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5])
def test_as_many_captions_are_left_out_as_asked(dropout: float) -> None:
    made = schedule(caption_dropout=dropout)
    rows = [row for step in range(500) for row in made.rows(step)]
    left_out = sum(row.caption is None for row in rows)
    assert left_out / len(rows) == pytest.approx(dropout, abs=0.03 if dropout else 0)
    for row in rows:
        assert row.caption in (None, *row.view.photo.captions)


def test_a_dropped_caption_moves_nothing_else() -> None:
    made, other = schedule(), schedule(caption_dropout=0.9)
    for row, without in zip(made.rows(3), other.rows(3), strict=True):
        assert (row.view, row.quantile, row.stream) == (
            without.view,
            without.quantile,
            without.stream,
        )


def test_each_of_a_pictures_captions_is_drawn() -> None:
    said = ("a sks dog", "sks dog, asleep", "sks dog on grass")
    pictures = [Photo("dog.png", "x", "dog.png", None, said, "dog", 64, 64)]
    made = schedule(pictures=pictures, priors=2)
    drawn = Counter(row.caption for step in range(300) for row in mixed(step, made)[0])
    assert set(drawn) == set(said)
    assert min(drawn.values()) > 340
    assert made.captions() == sorted([*said, "prior 0", "prior 1"])


def test_half_of_the_views_are_mirrored_and_every_crop_is_as_likely() -> None:
    pictures = [Photo("dog.png", "x", "dog.png", None, ("x",), "dog", 300, 100)]
    made = schedule(pictures=pictures, priors=0, flip=True)
    seen = [row.view.frame for step in range(500) for row in made.rows(step)]
    assert sum(frame.mirrored for frame in seen) / 2000 == pytest.approx(0.5, abs=0.05)
    lefts = Counter(frame.left for frame in seen)
    assert len(lefts) == 4
    assert all(count == pytest.approx(500, abs=90) for count in lefts.values())


@pytest.mark.parametrize("most", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("priors", [0, 5])
@pytest.mark.parametrize("buckets", [False, True])
def test_micro_batches_keep_every_row(most: int | None, priors: int, buckets: bool) -> None:
    made = schedule(priors=priors, buckets=buckets, global_batch_size=8)
    for step in range(10):
        rows = made.rows(step)
        parts = micro_batches(rows, most)
        order = {row.stream: place for place, row in enumerate(rows)}
        places = [order[row.stream] for part in parts for row in part]
        assert sorted(places) == list(range(len(rows)))
        for part in parts:
            assert len({(row.view.frame.width, row.view.frame.height) for row in part}) == 1
            assert [order[row.stream] for row in part] == sorted(order[row.stream] for row in part)
            assert len(part) <= (most or 16) * (2 if priors else 1)


def test_micro_batches_hold_photographs_with_their_class_images() -> None:
    made = schedule(buckets=False, global_batch_size=6)
    parts = micro_batches(made.rows(0), 2)
    assert [len(part) for part in parts] == [4, 4, 4]
    for part in parts:
        assert [row.view.is_prior for row in part] == [False, True] * 2
        assert [row.stream[2] for row in part[::2]] == [row.stream[2] for row in part[1::2]]
    assert [len(part) for part in micro_batches(made.rows(0), None)] == [12]
    assert micro_batches([], 2) == []


def tagged(**train: Any) -> list[str]:
    """The captions of many rows of a photograph with five tags; those of class images stay."""
    (photo,) = photos(1)
    photo = dataclasses.replace(photo, captions=("sks dog, a,b , c, ,d",))
    images = tuple(dataclasses.replace(image, captions=("x, y",)) for image in photos(2, "prior"))
    config = TrainConfig(global_batch_size=4, seed=3, **train)
    made = BatchSchedule(config, [subject([photo], images)], 64, 8)
    rows = [row for step in range(100) for row in made.rows(step)]
    assert {row.caption for row in rows if row.view.is_prior} == {"x, y"}
    shares = [row for step in range(100) for rank in (0, 1) for row in made.rows(step, rank, 2)]
    assert {(row.stream, row.caption) for row in shares} == {(r.stream, r.caption) for r in rows}
    return [str(row.caption) for row in rows if not row.view.is_prior]


def test_tags_are_shuffled_behind_those_that_are_kept() -> None:
    assert set(tagged()) == {"sks dog, a,b , c, ,d"}
    said = [caption.split(", ") for caption in tagged(shuffle_tags=True, keep_tags=1)]
    assert {tags[0] for tags in said} == {"sks dog"}
    assert all(sorted(tags[1:]) == ["a", "b", "c", "d"] for tags in said)
    orders = Counter("".join(tags[1:]) for tags in said)
    assert len(orders) == 24
    assert max(orders.values()) < 40  # of 400, 17 each
    first = Counter(tags[0] for tags in (text.split(", ") for text in tagged(shuffle_tags=True)))
    assert len(first) == 5


def test_tags_are_left_out() -> None:
    said = [caption.split(", ") for caption in tagged(tag_dropout=0.25, keep_tags=1)]
    assert {tags[0] for tags in said} == {"sks dog"}
    assert all(tags[1:] == sorted(tags[1:]) for tags in said), "in their order"
    assert sum(len(tags) - 1 for tags in said) / len(said) == pytest.approx(3, abs=0.2)
