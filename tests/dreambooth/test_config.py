"""Mistakes in a run's settings: each told by its key, with the way out, before any work."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.cli import main
from rayjobs.config import BadInput, load_config
from rayjobs.dreambooth import lock
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.config.identifier import identifier_in
from rayjobs.dreambooth.report import _skipped
from rayjobs.dreambooth.resolved import resolve

CONFIG = str(Path(__file__).parents[2] / "configs/demo/dreambooth.yaml")
LORA = "train.method=lora"

MISTAKES = [
    (["train.global_batch_size=3"], "workers.min=2 workers cannot share evenly"),
    (["workers.min=1", "workers.max=3"], "workers.max=3 workers cannot share evenly"),
    (["workers.max=1"], "workers.max is 1, below workers.min, 2"),
    (["train.steps=0"], "train.steps is 0"),
    (["train.learning_rate=-1"], "train.learning_rate is -1"),
    (["train.resolution=100"], "multiple of 8, such as 96"),
    (["train.method=dora"], "train.method is 'dora'"),
    (["train.warmup_steps=900"], "train.warmup_steps is 900, but there are"),
    (["train.typo=1"], "train.typo: unknown key"),
    (["lora.rank=0"], "lora.rank is 0"),
    (["lora.dropout=1"], "lora.dropout is 1"),
    (["prior.prompt="], "prior.prompt is missing: the class"),
    (["prior.prompt=a photo of a dog"], "lacks the class word 'dog'"),
    (["instance.prompt=a photo of a star"], "no word that prior.prompt lacks"),
    (["instance.prompt="], "instance.prompt"),
    (["validation.every_n_steps=300"], "a multiple of checkpoint.every_n_steps, 250"),
    (["validation.prompts=['']"], "has an empty prompt"),
    (["validation.prompts=['a AND b']", "validation.prompt_syntax=a1111"], "has AND between"),
    (["checkpoint.keep=0"], "checkpoint.keep is 0"),
    (["run.name=a/b"], "run.name is 'a/b'"),
    (["train.strategy=fsdp", "train.method=lora"], "train.strategy fsdp is for train.method full"),
    (["train.strategy=fsdp", "train.precision=fp16"], "fp16 has no loss scaling under fsdp"),
    (
        ["concepts=[{uri: cats, prompt: a photo of a olis cat}]"],
        r"concepts[0].class_prompt is missing: the class",
    ),
    (
        ["concepts=[{uri: cats, prompt: a olis cat, class_prompt: a dog}]"],
        "concepts[0].prompt 'a olis cat' lacks the class word 'dog' of concepts[0].class_prompt",
    ),
    (
        ["concepts=[{uri: x, prompt: a photo of a sks star, class_prompt: a photo of a star}]"],
        "concepts[0].prompt is that of instance.prompt; give each subject its own word",
    ),
    (
        ["concepts=[{uri: x, prompt: a ok cat, class_prompt: a cat}]", "inversion.num_vectors=2"],
        "inversion.num_vectors learns the word of one subject",
    ),
    (["train.fused_backward=true", "workers.min=1"], "give train.buckets=false and leave"),
    (["train.fused_backward=true", "train.buckets=false"], "give workers.max=1"),
    (["train.block_rates={up: 2}"], "'up' is no block of a UNet; its blocks are conv_in"),
    (["train.block_rates={mid_block: -1}"], "mid_block is -1.0; give 0 or more"),
    (["train.optimizer=prodigy", "lora.plus_ratio=16"], "prodigy finds one rate for all"),
    (["validation.patience=2"], "waits for losses that are not measured"),
    (
        ["validation.patience=2", "validation.loss_every_n_steps=100"],
        "must be a multiple of checkpoint.every_n_steps, 250",
    ),
    (["train.debiased=true", "train.min_snr_gamma=5"], "weigh the same steps in opposite ways"),
    (["inversion.alone=true"], "give inversion.num_vectors"),
    (
        ["inversion.alone=true", "inversion.num_vectors=2", "train.text_encoders=true"],
        "leave train.text_encoders out",
    ),
    (["inversion.num_vectors=1", "inversion.token=<new>"], "lacks the word to learn, '<new>'"),
]


@pytest.mark.parametrize(("overrides", "told"), MISTAKES)
def test_a_mistake_in_the_settings(
    overrides: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert main(["dreambooth", CONFIG, f"output.uri={output}", *overrides]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert "Traceback" not in said
    assert not output.exists()


def config(folder: Path, *overrides: str) -> DreamBoothConfig:
    return load_config(DreamBoothConfig, CONFIG, [f"output.uri={folder}/out", *overrides])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.uri=absent"], "model.uri: model 'absent'"),
        (["instance.uri=absent"], "absent: no such folder of pictures"),
        (["trackers.wandb={}"], "trackers.wandb needs the package wandb"),
        (["model.uri={edm}", "train.min_snr_gamma=5"], "not defined for an EDM model"),
        (["train.optimizer=prodigy"], "train.optimizer prodigy needs the package prodigyopt"),
        (["train.optimizer=adamw8bit"], "train.optimizer adamw8bit needs the package bitsandbytes"),
        (["train.precision=fp16"], "fp16 needs a GPU, and workers.num_gpus is 0"),
        (["validation.encoders.subject=./absent"], r"encoders.subject: ./absent does not exist"),
        (["validation.encoders.prompt=configs"], "configs is no encoder: it has no config.json"),
        (["inversion.num_vectors=2", "inversion.token=star"], "knows 'star' already"),
        (["train.block_rates={up_blocks.7: 2}"], r"up_blocks.7: the model's up_blocks are 0 \.\. "),
        (
            ["train.block_rates={conv_in: 2}", LORA],
            "conv_in has no layer that lora.targets=attention",
        ),
        (["train.block_rates={down_blocks.0: 2}", LORA], "down_blocks.0 has no layer that"),
    ],
)
def test_a_mistake_seen_only_by_looking(
    overrides: list[str], told: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    filled = [text.replace("{edm}", str(folders["playground"])) for text in overrides]
    with pytest.raises(BadInput, match=told):
        resolve(config(tmp_path, *filled))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"prediction_type": "sample"}, "predicts 'sample'; training knows epsilon and v_pred"),
        ({"rescale_betas_zero_snr": True}, "its schedule ends in pure noise"),
    ],
)
def test_a_schedule_that_cannot_be_trained_on(
    changed: dict[str, Any], told: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    shutil.copytree(folders["sdxl"], tmp_path / "model", copy_function=os.link)
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text()) | changed
    file.unlink()
    file.write_text(json.dumps(values))
    with pytest.raises(BadInput, match=told):
        resolve(config(tmp_path, f"model.uri={tmp_path}/model"))


WANDB = """
def init(project=None, entity=None, mode=None): ...
class api: api_key = {key!r}
"""


@pytest.mark.parametrize(
    ("settings", "key", "told"),
    [
        ("{projekt: x}", "secret", r"wandb takes no argument 'projekt'; did you mean 'project'\?"),
        ("{project: x}", None, r"needs an API key: `wandb login`, or WANDB_API_KEY"),
        ("{project: x, offline: true}", None, None),
        ("{project: x, mode: disabled}", None, None),
        ("{entity: x}", "secret", None),
    ],
)
def test_a_tracker_is_looked_at_before_it_is_needed(
    settings: str,
    key: str | None,
    told: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "wandb.py").write_text(WANDB.format(key=key))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(BadInput, match=told) if told else nullcontext():
        resolve(config(tmp_path, f"trackers.wandb={settings}"))
    sys.modules.pop("wandb", None)


def test_a_picture_that_is_far_too_small(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (12, 12)).save(tmp_path / "photos" / "tiny.png")
    with pytest.raises(BadInput, match=r"tiny\.png: 12 x 12 pixels are far too few"):
        resolve(config(tmp_path, f"instance.uri={tmp_path}/photos"))


def test_an_identifier_that_means_something(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(config(tmp_path, "instance.prompt=a photo of a sks star"))
    assert capsys.readouterr().err == ""
    resolve(config(tmp_path, "instance.prompt=a photo of a incomprehensible star"))
    assert "'incomprehensible' is 13 tokens" in capsys.readouterr().err


def test_captions_that_teach_less_than_they_seem_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(Path(CONFIG).parent / "subject", photos)
    (nameless, long, *_) = sorted(path for path in photos.iterdir() if path.suffix == ".png")
    nameless.with_suffix(".txt").write_text("a star of asks on a beach")
    long.with_suffix(".txt").write_text("an SKS star, " + "red " * 90)
    (photos / "notes.txt").write_text("of mine")
    run = resolve(config(tmp_path, f"instance.uri={photos}"))
    told = capsys.readouterr().err
    assert f"captions without the identifier 'sks' teach nothing of it: {nameless.name}\n" in told
    assert re.search(rf"{long.name}: its caption has \d+ tokens, of which the model reads 75", told)
    assert "train.caption_syntax=a1111 reads all" in told
    assert "passed over, a caption of no picture: notes.txt" in told
    assert "notes.txt (a caption of no picture)" in _skipped(run.skipped)


def test_captions_in_a_prompt_s_syntax(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What their syntax cannot have, and what of them is not as it was perhaps meant."""
    photos = tmp_path / "photos"
    shutil.copytree(Path(CONFIG).parent / "subject", photos)
    first = min(path for path in photos.iterdir() if path.suffix == ".png")

    def told(caption: str, *changes: str) -> str:
        first.with_suffix(".txt").write_text(caption)
        try:
            resolve(config(tmp_path, f"instance.uri={photos}", *changes))
        except BadInput as error:
            return f"refused: {error}"
        return capsys.readouterr().err

    a1111 = "train.caption_syntax=a1111"
    assert f"taken as plain text, and {a1111} reads them: {first.name}" in told("a (sks:1.2) star")
    weighted = told("a (sks:1.2) star", a1111)
    assert "words in brackets are weighted" in weighted
    assert told("a sks star, " + "red " * 90, a1111) == ""
    assert told(r"a sks star \(of mine\)", a1111, "train.shuffle_tags=true") == ""
    assert told("sks star, (red, pink:1.2), small", a1111, "train.shuffle_tags=true").startswith(
        f"refused: {first.name}: its caption has brackets around several tags"
    )
    for changing in ("[red:pink:0.5]", "[red|pink]"):
        assert "words that change from step to step" in told(f"a sks star {changing}", a1111)
    assert "make it shorter" in told("a sks star" + " red" * 3600, a1111)


def test_several_subjects(tmp_path: Path, picture: Callable[[int], Image.Image]) -> None:
    """Each with its class: one that another has too shares its images."""
    for name in ("cats", "owls"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "red.png")
    concepts = [
        {"uri": f"{tmp_path}/cats", "prompt": "a ab cat", "class_prompt": "a cat", "repeats": 2},
        {"uri": f"{tmp_path}/owls", "prompt": "a cd star", "class_prompt": "a photo of a star"},
    ]
    run = resolve(config(tmp_path, f"concepts={json.dumps(concepts)}"))
    assert [subject.prompt for subject in run.subjects] == [
        "a photo of a sks star",
        "a ab cat",
        "a cd star",
    ]
    places = [Path(subject.class_uri).name for subject in run.subjects]
    assert places == ["prior", "prior-2", "prior"]
    assert [subject.repeats for subject in run.subjects] == [1, 2, 1]
    (photo,) = run.subjects[1].photos
    images = {subject.class_uri: [photo] for subject in run.subjects}
    assert all(subject.class_images for subject in run.with_class_images(images).subjects)
    described = lock.describe(run)
    assert described["photos"]["concept 2: red.png"] == [photo.sha256, "a ab cat"]
    assert described["photos"]["red.png"][0] != photo.sha256
    assert "uri" not in described["concepts"][0]


def test_photographs_without_a_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve(config(tmp_path, "train.masks=alpha"))
    assert "train.masks=alpha: no mask, all of it counts: black.png, red" in capsys.readouterr().err
    resolve(config(tmp_path, "train.masks=files"))
    assert "train.masks=files: no mask, all of it counts" in capsys.readouterr().err
    photos = tmp_path / "photos"
    shutil.copytree(Path(CONFIG).parent / "subject", photos)
    Image.new("L", (64, 64)).save(photos / "red-mask.png")
    resolve(config(tmp_path, f"instance.uri={photos}", "train.masks=files"))
    assert "train.masks=files: a mask without any white: red.png" in capsys.readouterr().err


def test_an_average_that_reaches_further_back_than_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve(config(tmp_path, "train.ema_decay=0.9999", "train.steps=60"))
    told = capsys.readouterr().err
    assert "train.ema_decay 0.9999 averages over more than the 60 train.steps" in told
    assert "at 0.87" in told


def test_the_identifier_is_what_the_class_lacks() -> None:
    assert identifier_in("a photo of sks dog", "a photo of a dog") == "sks"
    assert identifier_in("a photo of a dog", "a photo of dog") == ""
    assert identifier_in("my olis backpack", "a backpack") == "olis"


def test_the_identifier_is_guessed_without_a_class() -> None:
    assert identifier_in("a photo of sks dog", "") == "sks"
    assert identifier_in("A picture of the olis backpack", "") == "olis"
    assert identifier_in("a photo of <sks>", "") == "<sks>"


def test_every_default_is_shown(tmp_path: Path) -> None:
    values: dict[str, Any] = config(tmp_path).model_dump()
    assert values["train"]["adam_beta2"] == 0.999
    assert DreamBoothConfig.model_validate(values) == config(tmp_path)
