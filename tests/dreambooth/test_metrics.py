"""Likeness, preservation and diversity: their definitions, their encoders, the choice by them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from rayjobs.config import BadInput, load_config
from rayjobs.dreambooth import metrics, results
from rayjobs.dreambooth.config import EncodersConfig
from rayjobs.dreambooth.config.evaluate import EvaluateConfig, read_prompts
from rayjobs.dreambooth.results import Result
from rayjobs.starter import subject, world

CONFIG = str(Path(__file__).parents[2] / "configs/demo/evaluate.yaml")


class Table:
    """An encoder whose answer for a picture is written in its first pixel."""

    def __init__(self, vectors: list[list[float]]):
        rows = np.array(vectors, float)
        self.vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def features(self, pictures: metrics.Pictures) -> np.ndarray:
        return self.vectors[[np.asarray(picture)[0, 0, 0] for picture in pictures]]

    def likeness(self, pictures: metrics.Pictures, prompts: list[str]) -> np.ndarray:
        return np.array([float(prompt[-1]) for prompt in prompts])


def number(index: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (index, 0, 0))


def test_the_definitions() -> None:
    table = Table([[1, 0], [0, 1], [1, 1]])
    made = {"p 1": [number(0), number(2)], "p 3": [number(2)]}
    of_class = {"c": [number(1), number(2), number(1)]}
    found = metrics.measure(table, table, [number(0), number(1)], made, of_class)
    half = 2**-0.5
    assert found["subject_likeness"] == pytest.approx((1 + 0 + 4 * half) / 6)
    assert found["prompt_likeness"] == pytest.approx((1 + 1 + 3) / 3)
    assert found["preservation"] == pytest.approx((0 + 1 + half + half + 0 + 1) / 6)
    assert found["diversity"] == pytest.approx(((1 - half) + 0 + (1 - half)) / 3)


def test_an_overfitted_model_scores_less() -> None:
    good = {"subject_likeness": 0.7, "prompt_likeness": 0.3, "preservation": 0.5}
    overfitted = {"subject_likeness": 0.8, "prompt_likeness": 0.25, "preservation": 0.65}
    assert metrics.joint_score(good) > metrics.joint_score(overfitted)


def test_learning_counts_from_where_the_model_was() -> None:
    before = {"subject_likeness": 0.67, "prompt_likeness": 0.94, "preservation": 0.65}
    half_learned = {"subject_likeness": 0.75, "prompt_likeness": 0.95, "preservation": 0.67}
    learned = {"subject_likeness": 0.9, "prompt_likeness": 0.94, "preservation": 0.74}
    forgotten = {"subject_likeness": 0.95, "prompt_likeness": 0.6, "preservation": 0.95}
    assert metrics.joint_score(before, before) == 0
    scores = [metrics.joint_score(found, before) for found in (learned, half_learned, forgotten)]
    assert scores == sorted(scores, reverse=True)


def test_a_vision_transformer_by_uri(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    ViTModel(small, add_pooling_layer=False).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    encoder, _ = metrics.load_encoders(EncodersConfig(subject=str(tmp_path)), "cpu")
    assert encoder is not None
    pictures = [Image.fromarray(subject.draw("red", np.random.default_rng(i))) for i in range(2)]
    features = encoder.features(pictures)
    assert features.shape == (2, 16)
    assert np.linalg.norm(features, axis=1) == pytest.approx([1, 1], abs=1e-5)
    absent = str(tmp_path / "absent")  # a path: what could be on the hub is asked for, for long
    with pytest.raises(BadInput, match=r"encoders\.subject: '.*/absent' cannot be loaded"):
        metrics.load_encoders(EncodersConfig(subject=absent), "cpu")


def test_the_stand_ins_tell_the_subject_from_its_class() -> None:
    encoder = metrics.Starter()
    rng = np.random.default_rng(0)
    mine = [Image.fromarray(subject.draw(g, rng)) for g in ("red", "cyan", "white", "green")]
    stars = [
        Image.fromarray(world.draw(world.Scene(c, "star", "white"), rng))
        for c in ("red", "blue", "black", "orange")
    ]
    one, other = encoder.features(mine[:2]), encoder.features(mine[2:])
    others = encoder.features(stars)
    assert (one @ other.T).mean() > (one @ others.T).mean() + 0.2
    fit = encoder.likeness(mine[:2], ["a sks star on a red background"] * 2)
    assert fit.tolist() == [1.0, 0.5]


def test_the_best_and_what_is_kept() -> None:
    seen = [Result(0, 0.9, {}, {}), Result(10, 0.5, {}, {}), Result(20, 0.4, {}, {})]
    assert results.best_step(seen) == 10
    assert results.best_step([Result(10, None, {}, {})]) is None
    steps = [5, 10, 15, 20, 25, 30]
    assert results.to_keep(steps, seen, 2, 0) == {10, 30}
    assert results.to_keep(steps, seen, 3, 10) == {10, 25, 30}
    assert results.to_keep(steps, [], 2, 10) == {10, 20, 25, 30}
    assert results.to_keep([], [], 2, 10) == set()


PAPER = """Classes

subject_name,class
dog,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token),
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]
"""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("object", ["a sks dog in the jungle", "a red sks dog"]),
        ("live", ["a sks dog wearing a red hat", "a cube shaped sks dog"]),
    ],
)
def test_the_papers_prompts(tmp_path: Path, kind: str, expected: list[str]) -> None:
    (tmp_path / "prompts.txt").write_text(PAPER)
    config = load_config(
        EvaluateConfig,
        CONFIG,
        [
            "prompts.inline=[]",
            f"prompts.uri={tmp_path}/prompts.txt",
            f"prompts.kind={kind}",
            "subject.class_word=dog",
        ],
    )
    assert read_prompts(config) == expected


def test_a_plain_list_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# mine\na {identifier} {class} at sea\n\na {0} {1}\n")
    overrides = ["prompts.inline=[]", f"prompts.uri={tmp_path}/prompts.txt"]
    config = load_config(EvaluateConfig, CONFIG, overrides)
    assert read_prompts(config) == ["a sks star at sea", "a sks star"]
