"""Scores against what transformers itself computes, on tiny random models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from rayjobs.config import BadInput
from rayjobs.quality.scores import Asked, Scorer
from rayjobs.starter import components

Make = Callable[[int], Image.Image]
WIDTH = 16
LAION = {0: (WIDTH, 24), 2: (24, 12), 4: (12, 8), 6: (8, 4), 7: (4, 1)}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def save_clip(folder: Path) -> str:
    tokenizer = components.save_tokenizer(folder, components.END)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    text |= {"pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config=TOWER | text, vision_config=TOWER | vision, projection_dim=WIDTH
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return str(folder)


def classifier(folder: Path, *labels: str, **options: object) -> str:
    torch.manual_seed(1)
    config = ViTConfig(
        **TOWER,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: n for n, label in enumerate(labels)},
        **options,
    )
    model = ViTForImageClassification(config)
    model.classifier.bias.data = torch.linspace(0, 1, len(labels))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def probabilities(folder: str, image: Image.Image) -> list[float]:
    pixels = ViTImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.inference_mode():
        logits = ViTForImageClassification.from_pretrained(folder).eval()(**pixels).logits
    return logits.softmax(-1)[0].tolist()


def laion(path: Path, prefix: str = "layers.", layers: dict = LAION) -> tuple[str, torch.nn.Module]:
    """A predictor's file and the module that was saved."""
    torch.manual_seed(2)
    parts = {n: torch.nn.Linear(*shape) for n, shape in layers.items()}
    tensors = {
        f"{prefix}{n}.{name}": value
        for n, part in parts.items()
        for name, value in part.state_dict().items()
    }
    save_file(tensors, path)
    return str(path), torch.nn.Sequential(*parts.values())


def embeddings(folder: str, image: Image.Image, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of picture and text, not normalised, by the whole model's own forward pass."""
    tokens = CLIPTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt")
    with torch.inference_mode():
        out = CLIPModel.from_pretrained(folder).eval()(**tokens, **pixels)
    return out.image_embeds[0], out.text_embeds[0]


def test_clip_score_is_the_cosine_that_transformers_gives(clip: str, picture: Make) -> None:
    scorer = Scorer(Asked(clip, None, None))
    for number, text in enumerate(("a photo of a red star", "", "Two blue rings, ünïcode")):
        image, words = embeddings(clip, picture(number), text)
        cosine = torch.cosine_similarity(image, words, dim=0).item()
        assert scorer.score(picture(number), text) == {
            "clip_score": pytest.approx(cosine, abs=1e-5)
        }


def test_pick_and_hps_scores_are_as_their_own_code_has_them(clip: str, picture: Make) -> None:
    """PickScore: `logit_scale.exp() * (text_embs @ image_embs.T)`; HPSv2: without the factor."""
    scorer = Scorer(Asked(clip, pick=clip, hps=clip, embedding=True))
    assert len({id(each) for each in scorer.clips.values()}) == 1
    image, words = embeddings(clip, picture(2), "a red star")
    cosine = torch.cosine_similarity(image, words, dim=0).item()
    scale = CLIPModel.from_pretrained(clip).logit_scale.exp().item()
    found = scorer.score(picture(2), "a red star")
    assert found.pop("embedding") == pytest.approx((image / image.norm()).tolist(), abs=1e-5)
    assert found == {
        "clip_score": pytest.approx(cosine, abs=1e-5),
        "pick_score": pytest.approx(scale * cosine, abs=1e-4),
        "hps_score": pytest.approx(cosine, abs=1e-5),
    }
    alone = Scorer(Asked(clip)).score(picture(2), "a red star")
    assert alone["clip_score"] == found["clip_score"]  # to the last bit


def test_a_long_prompt_is_cut_to_the_models_length(clip: str, picture: Make) -> None:
    scorer = Scorer(Asked(clip, None, None))
    cut, longer = ("red star " * n for n in (40, 60))
    assert scorer.score(picture(0), cut + "circle") == scorer.score(picture(0), longer)


def test_a_score_depends_on_picture_and_prompt_alone(clip: str, picture: Make) -> None:
    scorer = Scorer(Asked(clip, None, None))
    first = scorer.score(picture(0), "a red star")
    scorer.score(picture(1).resize((200, 90)), "a circle " * 90)
    assert scorer.score(picture(0), "a red star") == first
    assert Scorer(Asked(clip, None, None)).score(picture(0).convert("RGBA"), "a red star") == first


@pytest.mark.parametrize("prefix", ["layers.", "", "model.mlp.", "aesthetic."])
def test_aesthetic_score_is_the_predictor_over_the_unit_embedding(
    clip: str, picture: Make, tmp_path: Path, prefix: str
) -> None:
    path, predictor = laion(tmp_path / "predictor.safetensors", prefix)
    image, _ = embeddings(clip, picture(4), "a")
    with torch.inference_mode():
        expected = predictor(image / image.norm()).item()
    found = Scorer(Asked(clip, path, None)).score(picture(4), "a")
    assert found["aesthetic_score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("prefix", ["", "linear."])
def test_a_single_layer_is_a_predictor(
    clip: str, picture: Make, tmp_path: Path, prefix: str
) -> None:
    weight, bias = torch.arange(WIDTH).float()[None], torch.tensor([5.0])
    path = tmp_path / "linear.safetensors"
    save_file({f"{prefix}weight": weight.half(), f"{prefix}bias": bias}, path)
    image, _ = embeddings(clip, picture(4), "a")
    expected = (weight @ (image / image.norm()) + bias).item()
    found = Scorer(Asked(clip, str(path), None)).score(picture(4), "a")
    assert found["aesthetic_score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "unsafe"),
    [
        (("normal", "nsfw"), [1]),
        (("drawings", "hentai", "neutral", "porn", "sexy"), [1, 3, 4]),
        (("SFW", "NSFW"), [1]),
        (("neutral", "low", "medium", "high"), [1, 2, 3]),
    ],
)
def test_unsafe_score_is_the_probability_of_unsafe_labels(
    picture: Make, tmp_path: Path, labels: tuple[str, ...], unsafe: list[int]
) -> None:
    folder = classifier(tmp_path, *labels)
    shares = probabilities(folder, picture(5))
    found = Scorer(Asked(None, None, folder)).score(picture(5), "")
    assert found == {"unsafe_score": pytest.approx(sum(shares[n] for n in unsafe), abs=1e-5)}


def test_all_scores_together_in_bfloat16(clip: str, picture: Make, tmp_path: Path) -> None:
    path, _ = laion(tmp_path / "predictor.safetensors")
    folder = classifier(tmp_path / "safety", "normal", "nsfw")
    half, full = (
        Scorer(Asked(clip, path, folder), "cpu", dtype).score(picture(6), "a red star")
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert list(half) == ["clip_score", "aesthetic_score", "unsafe_score"]
    assert half == pytest.approx(full, abs=0.05)


def refused(clip: str | None, aesthetic: str | None, safety: str | None) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Scorer(Asked(clip, aesthetic, safety))
    return str(error.value)


def test_what_is_not_such_a_model_is_refused_by_name(clip: str, tmp_path: Path) -> None:
    vit = classifier(tmp_path / "vit", "cat", "dog")
    assert f"quality.clip: {vit} is a model of type vit" in refused(vit, None, None)
    message = refused(None, None, vit)
    assert vit in message
    assert "cat, dog" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"quality.clip: {empty} cannot be loaded" in refused(str(empty), None, None)
    assert f"quality.safety: {empty} cannot be loaded" in refused(None, None, str(empty))
    ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8)).save_pretrained(tmp_path / "bare")
    assert "lacks" in refused(None, None, str(tmp_path / "bare"))
    assert "needs quality.clip" in refused(None, vit, None)


def test_several_labels_at_once_are_refused(tmp_path: Path) -> None:
    kind = "multi_label_classification"
    folder = classifier(tmp_path, "normal", "nsfw", problem_type=kind)
    assert "does not tell safe from unsafe" in refused(None, None, folder)


def test_damaged_and_pickled_weights_are_refused(clip: str, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((Path(clip) / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "is a pickle" in refused(str(tmp_path), None, None)
    (tmp_path / "model.safetensors").write_bytes(b"not much")
    assert f"quality.clip: {tmp_path} cannot be loaded" in refused(str(tmp_path), None, None)


@pytest.mark.parametrize(
    "layers",
    [
        {0: (WIDTH, 8), 3: (8, 1)},
        {0: (WIDTH, 8), 2: (8, 2)},
        {0: (WIDTH + 1, 1)},
        {0: (WIDTH, 8), 2: (9, 1)},
    ],
    ids=["activation between", "two values", "other clip", "layers that do not fit"],
)
def test_other_predictors_are_refused(clip: str, tmp_path: Path, layers: dict) -> None:
    path, _ = laion(tmp_path / "other.safetensors", layers=layers)
    assert f"{path} is not an aesthetic predictor" in refused(clip, path, None)


def test_a_file_that_is_no_predictor_is_refused(clip: str, tmp_path: Path) -> None:
    for name in ("predictor.pth", "absent.safetensors", "text.safetensors"):
        path = tmp_path / name
        if not name.startswith("absent"):
            path.write_text("nothing")
        assert f"quality.aesthetic: {path}" in refused(clip, str(path), None)
    save_file({"layers.0.gain": torch.ones(1, WIDTH)}, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match="is not linear"):
        Scorer(Asked(clip, str(tmp_path / "odd.safetensors"), None))
