"""A run goes on only as itself; what moves no weight may change."""

from pathlib import Path
from typing import Any

import pytest

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dreambooth import lock
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import Photo
from rayjobs.dreambooth.resolved import ResolvedRun


def photo(name: str, *captions: str, sha256: str = "") -> Photo:
    return Photo(name, "x", name, None, captions or ("a sks dog",), sha256 or name, 64, 64)


def describe(
    photos: list[Photo] | None = None,
    priors: list[Photo] | None = None,
    sha256: str = "abc",
    **changed: Any,
) -> dict[str, Any]:
    """The run of a small configuration; `train__seed=1` changes one of its keys."""
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "instance": {"uri": "dogs", "prompt": "a photo of sks dog"},
        "prior": {"prompt": "a photo of dog"},
        "run": {"name": "first"},
        "output": {"uri": "runs/first"},
    }
    for key, value in changed.items():
        section, _, name = key.partition("__")
        values[section] = values.get(section, {}) | {name: value} if name else value
    config = DreamBoothConfig.model_validate(values)
    instance = photos or [photo("a.png"), photo("b.png")]
    run = ResolvedRun(
        config, sha256, tuple(instance), tuple(priors or [photo("p.png", "a photo of dog")])
    )
    return lock.describe(run)


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's folder with a checkpoint: on this machine, then in a bucket."""
    folder = str(tmp_path / "run")
    if request.param == "s3":
        folder = storage.join(request.getfixturevalue("bucket"), "run")
    return checkpointed(folder)


def checkpointed(folder: str | Path) -> str:
    """The folder, with what stands for a checkpoint: only a run that made something is kept."""
    storage.write_bytes(storage.join(str(folder), "checkpoints", "step-00000001.json"), b"{}")
    return str(folder)


def refusal(uri: str, run: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as caught:
        lock.enter(uri, run)
    return str(caught.value)


def test_the_same_run_enters_again(uri: str) -> None:
    lock.enter(uri, describe())
    written = storage.read_bytes(storage.join(uri, lock.FILE))
    lock.enter(uri, describe())
    assert lock.FILE in storage.list_files(uri)
    assert storage.read_bytes(storage.join(uri, lock.FILE)) == written


def test_other_settings_are_refused_with_the_difference(uri: str) -> None:
    lock.enter(uri, describe())
    told = refusal(uri, describe(train__learning_rate=3e-4, lora__rank=4))
    assert told.splitlines() == [
        f"the run 'first' in {uri} was begun with other settings; take them back, or give another "
        "run.name and output.uri:",
        "  lora.rank: 16 there, 4 now",
        "  train.learning_rate: 0.0001 there, 0.0003 now",
    ]
    lock.enter(uri, describe())


def test_another_runs_name_is_refused(uri: str) -> None:
    lock.enter(uri, describe())
    told = refusal(uri, describe(run__name="second"))
    assert told == f"{uri} holds the run 'first', not 'second'; give another output.uri"
    assert "not 'second'" in refusal(uri, describe(run__name="second", train__seed=5))


@pytest.mark.parametrize(
    "changed",
    [
        {"workers__min": 2, "workers__max": 4, "workers__num_gpus": 1, "workers__max_failures": 0},
        {"checkpoint__every_n_steps": 10, "checkpoint__keep": 7},
        {"validation__every_n_steps": 200, "validation__prompts": ["a sks dog on a beach"]},
        {"output__uri": "elsewhere", "output__fused": True, "output__kohya": True},
        {"trackers__wandb": {"project": "dogs"}},
        {"train__micro_batch_size": 1, "train__gradient_checkpointing": True},
        {"model__device": "cpu"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_moves_no_weight_may_change(changed: dict[str, Any], tmp_path: Path) -> None:
    lock.enter(checkpointed(tmp_path), describe())
    lock.enter(str(tmp_path), describe(**changed))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"train__seed": 1}, "  train.seed: 0 there, 1 now"),
        ({"train__global_batch_size": 8}, "  train.global_batch_size: 4 there, 8 now"),
        ({"train__resolution": 64}, "  train.resolution: null there, 64 now"),
        ({"prior__weight": 0.5}, "  prior.weight: 1.0 there, 0.5 now"),
        ({"sha256": "def"}, '  model_sha256: "abc" there, "def" now'),
        ({"photos": [photo("a.png")]}, '  photos.b.png: ["b.png", "a sks dog"] there, null now'),
        (
            {"photos": [photo("a.png"), photo("b.png", "one", "two")]},
            '  photos.b.png: ["b.png", "a sks dog"] there, ["b.png", "one", "two"] now',
        ),
        (
            {"photos": [photo("a.png"), photo("b.png", sha256="other")]},
            '  photos.b.png: ["b.png", "a sks dog"] there, ["other", "a sks dog"] now',
        ),
        (
            {"priors": [photo("q.png", "a photo of dog")]},
            '  priors: ["p.png"] there, ["q.png"] now',
        ),
        (
            {"priors": [photo("p.png", "a black dog")]},
            '  priors: ["p.png"] there, ["p.png a black dog"] now',
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_moves_a_weight_may_not(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    lock.enter(checkpointed(tmp_path), describe())
    assert refusal(str(tmp_path), describe(**changed)).splitlines()[1:] == [told]


def test_the_order_of_class_images_does_not_matter(tmp_path: Path) -> None:
    lock.enter(checkpointed(tmp_path), describe(priors=[photo("p.png"), photo("q.png")]))
    lock.enter(str(tmp_path), describe(priors=[photo("q.png"), photo("p.png")]))


def test_long_differences_are_told_short(tmp_path: Path) -> None:
    long = describe(instance__prompt="a photo of sks dog " + "x" * 500)
    lock.enter(checkpointed(tmp_path), long)
    (difference,) = refusal(str(tmp_path), describe()).splitlines()[1:]
    assert len(difference) < 150
    assert difference.startswith('  instance.prompt: "a photo of sks dog xxx')
    other = describe(instance__prompt="a photo of sks dog " + "x" * 500 + "y")
    (difference,) = refusal(str(tmp_path), other).splitlines()[1:]
    assert difference.endswith('x" there, ...xxxxxxxxxxxxxxxxxxxxy" now'), "where they differ"


def test_a_difference_of_a_concept_is_told_by_its_key(tmp_path: Path) -> None:
    cat = {"uri": "cats", "prompt": "a photo of ab cat", "class_prompt": "a photo of cat"}
    lock.enter(checkpointed(tmp_path), describe(concepts=[cat]))
    told = refusal(str(tmp_path), describe(concepts=[cat | {"repeats": 2}]))
    assert told.splitlines()[1:] == ["  concepts[0].repeats: 1 there, 2 now"]


def test_a_run_gets_more_steps(uri: str) -> None:
    lock.enter(uri, describe(train__steps=100))
    lock.compare(uri, describe(train__steps=200))
    assert lock.num_steps(uri) == 100, "to compare changes nothing"
    lock.enter(uri, describe(train__steps=200))
    assert lock.num_steps(uri) == 200
    assert refusal(uri, describe(train__steps=100)).splitlines()[1:] == [
        "  train.steps: 200 there, 100 now"
    ]
    assert refusal(uri, describe(train__steps=300, train__seed=1)).splitlines()[1:] == [
        "  train.seed: 0 there, 1 now"
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_more_steps_that_would_change_the_first_ones(schedule: str, tmp_path: Path) -> None:
    lock.enter(checkpointed(tmp_path), describe(train__steps=100, train__schedule=schedule))
    longer = describe(train__steps=200, train__schedule=schedule)
    assert "train.steps: 100 there, 200 now" in refusal(str(tmp_path), longer)


def test_a_run_that_made_nothing_begins_anew(tmp_path: Path) -> None:
    """So that a corrected command is not refused; the first one, should it live, stops."""
    uri, first, second = str(tmp_path), describe(), describe(train__learning_rate=0.1)
    lock.enter(uri, first)
    lock.check_own(uri, first)
    lock.enter(uri, second)
    lock.check_own(uri, second)
    with pytest.raises(BadInput, match=r"train\.learning_rate: 0\.1 there, 0\.0001 now"):
        lock.check_own(uri, first)


def test_an_export_alone_is_something(tmp_path: Path) -> None:
    lock.enter(str(tmp_path), describe())
    storage.write_bytes(storage.join(str(tmp_path), "export", "manifest.json"), b"{}")
    assert "train.seed" in refusal(str(tmp_path), describe(train__seed=1))


@pytest.mark.parametrize("gone", ["train.ema_decay", "train.flip", "instance.prompt", "inversion"])
def test_a_lock_of_a_version_that_lacked_a_key(gone: str, tmp_path: Path) -> None:
    """The key's default is what that version did; another value is a difference."""
    there = describe()
    section, _, name = gone.partition(".")
    missing = there[section].pop(name) if name else there.pop(section)
    lock.enter(checkpointed(tmp_path), there)
    if gone == "instance.prompt":  # it has no default
        assert gone in refusal(str(tmp_path), describe())
        return
    lock.enter(str(tmp_path), describe())
    other = describe(train__ema_decay=0.5, train__flip=True, inversion__learning_rate=1.0)
    assert section in refusal(str(tmp_path), other), missing
