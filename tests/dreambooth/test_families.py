"""Training on tiny models of every family: what moves, and that its export works in diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from rayjobs.config import BadInput
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.modules import attention
from rayjobs.diffusion.request import Lora, Request
from rayjobs.dreambooth import export
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.tuned_model import TunedModel
from tests.dreambooth import fitting
from tests.dreambooth.fitting import differ, opened, resolved, settings
from tests.families import FAMILIES

# Lightning reads deprecated parts of torch.
pytestmark = [
    pytest.mark.model,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
KOHYA = "kohya_lora.safetensors"


def fit(config: DreamBoothConfig) -> tuple[TunedModel, list[dict[str, float]]]:
    return fitting.fit(resolved(config))


METHODS, MODES = ("lora", "full"), ("images", "teacher", "none")
PAIRWISE = [
    pytest.param(family, method, mode, marks=[pytest.mark.slow] if (f + m + k) % 2 else [])
    for f, family in enumerate(FAMILIES)
    for m, method in enumerate(METHODS)
    for k, mode in enumerate(MODES)
]
"""Every pair of two settings is in half of the combinations; the others are slow."""


@pytest.mark.parametrize(("family", "method", "mode"), PAIRWISE)
def test_two_steps(
    folders: dict[str, Path], photos: Path, family: str, method: str, mode: str
) -> None:
    """Every trained weight moves, no other does; the prior's loss is what its mode says."""
    config = settings(folders[family], photos, mode, method=method)
    tuned, rows = fit(config)
    of_prior = [row["loss_prior"] for row in rows]
    if mode == "images":
        assert min(of_prior) > 0.01
    elif mode == "teacher":  # nobody is off at first: the student is its own teacher
        assert of_prior[0] == pytest.approx(0, abs=1e-12)
        assert of_prior[1] > 1e-7
    else:
        assert of_prior == [0, 0]
    assert all(row["loss"] == row["loss_instance"] + row["loss_prior"] for row in rows)
    model = worker.load(config, "cpu", torch.float32)
    batches, module = worker.build(resolved(config), model, torch.float32)
    begun = module.tuned
    trained = tuned.trainable()
    assert trained.keys() == begun.trainable().keys()
    for name, before in begun.named_parameters():
        after = tuned.get_parameter(name)
        assert torch.equal(before, after) == (name not in trained), name
    vaes = (tuned.model.vae.state_dict(), begun.model.vae.state_dict())
    assert all(torch.equal(vaes[0][name], vaes[1][name]) for name in vaes[0])
    batch = batches.batch(batches.schedule.rows(0))
    before = module.losses(batch)[0].item()
    module.tuned = tuned
    after = module.losses(batch)[0].item()
    assert before == pytest.approx(rows[0]["loss_instance"], rel=1e-4)
    assert after < {"lora": 0.99, "full": 0.95}[method] * before


def test_text_encoders_may_stay(folders: dict[str, Path], photos: Path, family: str) -> None:
    config = settings(folders[family], photos, "teacher", text_encoders=False)
    tuned, _ = fit(config)
    assert all(name.startswith("unet.") for name in tuned.trainable())
    fresh = load_model(str(folders[family]))
    for ours, theirs in zip(tuned.model.text_encoders, fresh.text_encoders, strict=True):
        before = dict(theirs.named_parameters())
        assert all(torch.equal(before[name], p) for name, p in ours.named_parameters())


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("sdxl", "lora"),
        ("sd", "full"),
        ("playground", "lora"),
        pytest.param("sdxl", "full", marks=pytest.mark.slow),
        pytest.param("sd", "lora", marks=pytest.mark.slow),
        pytest.param("playground", "full", marks=pytest.mark.slow),
    ],
)
def test_saving_memory_moves_no_loss(
    folders: dict[str, Path], photos: Path, family: str, method: str
) -> None:
    """Neither dropout nor calls of one photograph lose their place when layers run twice."""
    runs = []
    for saves, most in ((False, None), (True, None), (True, 1)):
        config = settings(
            folders[family],
            photos,
            method=method,
            gradient_checkpointing=saves,
            micro_batch_size=most,
        )
        lora = config.lora.model_copy(update={"dropout": 0.3})
        runs.append([row["loss"] for row in fit(config.model_copy(update={"lora": lora}))[1]])
    assert runs[1] == pytest.approx(runs[0], abs=1e-6)
    assert runs[2] == pytest.approx(runs[0], abs=1e-5)


def draw(pipeline: Any) -> torch.Tensor:
    """A picture by diffusers' own pipeline, (3, H, W) in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a photo of a sks star",
        num_inference_steps=4,
        guidance_scale=4.0,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="pt",
    ).images
    return images[0]


def draw_ours(folder: Path, *loras: Path) -> torch.Tensor:
    """The same picture by our engine."""
    request = Request(
        prompt="a photo of a sks star",
        seed=1,
        steps=4,
        guidance_scale=4.0,
        width=64,
        height=64,
        loras=tuple(Lora(path=str(path)) for path in loras),
    )
    (result,) = Engine(load_model(str(folder))).generate([request], keep_pixels=True)
    assert result.pixels is not None, result.error
    return result.pixels


@pytest.mark.parametrize(
    ("family", "text_encoders"),
    [
        ("playground", True),
        pytest.param("sdxl", True, marks=pytest.mark.slow),
        pytest.param("sdxl", False, marks=pytest.mark.slow),
        pytest.param("sd", False, marks=pytest.mark.slow),
        pytest.param("sd", True, marks=pytest.mark.slow),
        pytest.param("playground", False, marks=pytest.mark.slow),
    ],
)
def test_an_exported_adapter(
    folders: dict[str, Path], photos: Path, family: str, text_encoders: bool, tmp_path: Path
) -> None:
    """Its file, its kohya file and the model it was fused into draw what the trained one draws."""
    base = folders[family]
    tuned, _ = fit(settings(base, photos, text_encoders=text_encoders))
    trained = draw(export.pipeline(tuned.model))
    assert differ(trained, draw(opened(base))) > 1e-2
    export.save(settings(base, photos), tuned, tmp_path)
    for name in (export.LORA_FILE, KOHYA):
        pipeline = opened(base)
        pipeline.load_lora_weights(tmp_path, weight_name=name)
        assert differ(draw(pipeline), trained) <= 1e-4, name
        assert differ(draw_ours(base, tmp_path / name), trained) <= 1e-4, name
    assert differ(draw_ours(base, tmp_path), trained) <= 1e-4
    assert differ(draw(opened(tmp_path / "fused")), trained) <= 1e-4
    assert differ(draw_ours(tmp_path / "fused"), trained) <= 1e-4


@pytest.mark.parametrize(
    "family",
    ["playground", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd"))],
)
def test_an_exported_model(
    folders: dict[str, Path], photos: Path, family: str, tmp_path: Path
) -> None:
    config = settings(folders[family], photos, method="full")
    tuned, _ = fit(config)
    trained = draw(export.pipeline(tuned.model))
    assert differ(trained, draw(opened(folders[family]))) > 1e-3
    export.save(config, tuned, tmp_path)
    assert differ(draw(DiffusionPipeline.from_pretrained(tmp_path)), trained) <= 1e-4
    assert differ(draw_ours(tmp_path), trained) <= 1e-4


@pytest.mark.parametrize("saves", [False, True])
def test_the_attention_kernel(
    folders: dict[str, Path], photos: Path, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.attention` holds in training, also where layers run again for their gradients."""
    config = settings(folders["sdxl"], photos, steps=1, gradient_checkpointing=saves)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"attention": "math"})}
    )
    seen: list[torch.Tensor] = []
    attend = attention.KERNELS["math"]

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(attend(*args, **kwargs))
        return seen[-1]

    monkeypatch.setitem(attention.KERNELS, "math", watch)
    tuned, _ = fit(config)
    num_layers = len(tuned.unet.attn_processors)
    assert len(seen) == num_layers * (2 if saves else 1)


def test_an_attention_kernel_that_there_is_not(folders: dict[str, Path], photos: Path) -> None:
    config = settings(folders["sdxl"], photos, steps=1)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"attention": "efficient"})}
    )
    with pytest.raises(BadInput, match=r"model\.attention efficient cannot train on this device"):
        fit(config)
