"""Training on tiny models of every family: what is exported works in plain diffusers, and the loss
is the one that plain torch calls give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch.func import functional_call

from rayjobs.config import BadInput
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.dreambooth import export
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data import bucketing
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.dreambooth.data.schedule import Row
from rayjobs.dreambooth.resolved import ResolvedRun
from rayjobs.dreambooth.training import worker
from rayjobs.dreambooth.training.batches import Batch
from rayjobs.dreambooth.training.tuned_model import TunedModel
from tests.dreambooth import fitting
from tests.families import FAMILIES

# Lightning reads deprecated parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
KOHYA = "kohya_lora.safetensors"
RANK, ALPHA = 4, 2
PRIOR_WEIGHT = 0.7
SIZES = {"0.png": (80, 64), "1.png": (64, 96)}
"""Width and height of the photographs; class images are 64 x 64."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, picture: Callable[[int], Image.Image]) -> Path:
    """Two photographs below `subject`, three class images below `class`."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("subject", "class"):
        (folder / name).mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        picture(number).resize(size).save(folder / "subject" / name)
    for number in range(3):
        picture(10 + number).save(folder / "class" / f"{number}.png")
    return folder


def settings(model: Path, photos: Path, mode: str = "images", **train: Any) -> DreamBoothConfig:
    usual = {"steps": 2, "global_batch_size": 2, "learning_rate": 1e-2, "text_encoders": True}
    small = {"resolution": 64, "crops": 1, "buckets": False, "weight_decay": 0}
    prior = {"prompt": "a photo of a star", "uri": str(photos / "class"), "weight": PRIOR_WEIGHT}
    return DreamBoothConfig.model_validate(
        {
            "model": {"uri": str(model)},
            "instance": {"uri": str(photos / "subject"), "prompt": "a photo of a sks star"},
            "prior": prior | {"mode": mode},
            "train": usual | small | train,
            "lora": {"rank": RANK, "alpha": ALPHA, "targets": "transformer"},
            "run": {"name": "test"},
            "output": {"uri": "unused", "cache": False, "kohya": True, "fused": True},
        }
    )


def resolved(config: DreamBoothConfig) -> ResolvedRun:
    photos = find_photos(config.instance.uri, config.instance.prompt)
    has_prior = config.prior.mode != "none"
    images = find_photos(str(config.prior.uri), str(config.prior.prompt)) if has_prior else []
    return ResolvedRun(config, "", tuple(photos), tuple(images))


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


def opened(folder: Path) -> Any:
    xl = "XL" in (folder / "model_index.json").read_text()
    return (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(folder)


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(
    ("family", "text_encoders"),
    [
        ("sdxl", True),
        ("sd", False),
        ("playground", True),
        pytest.param("sdxl", False, marks=pytest.mark.slow),
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


@pytest.mark.parametrize(("gamma", "drop"), [(None, 0.0), (5.0, 0.5)])
def test_the_loss_by_hand(
    folders: dict[str, Path], photos: Path, family: str, gamma: float | None, drop: float
) -> None:
    """One batch in plain diffusers: its loss, and its gradient for every factor of the adapters."""
    if family == "playground":
        gamma = None  # not defined for EDM
    config = settings(
        folders[family], photos, global_batch_size=4, caption_dropout=drop, min_snr_gamma=gamma
    )
    model = worker.load(config, "cpu", torch.float32)
    batches, module = worker.build(resolved(config), model, torch.float32)
    rows = batches.schedule.rows(3)
    assert any(row.caption is None for row in rows) == (drop > 0)
    batch = batches.batch(rows)
    pipeline = opened(folders[family])
    pipeline.unet.requires_grad_(False)
    assert differ(batch.z_BCHW, latents(pipeline, rows)) <= 1e-5
    factors = module.tuned.trainable()
    generator = torch.Generator().manual_seed(0)
    for factor in factors.values():
        torch.nn.init.normal_(factor, std=0.1, generator=generator)
    copies = {name: factor.detach().clone().requires_grad_() for name, factor in factors.items()}
    mine, wanted = module.losses(batch), by_hand(pipeline, batch, rows, copies, gamma)
    assert differ(mine, wanted) <= 1e-5 * max(1, wanted.max().item())
    mine.sum().backward()
    wanted.sum().backward()
    largest = max(gradient(copy).abs().max().item() for copy in copies.values())
    for name, copy in copies.items():
        assert gradient(copy).abs().max() > 0, name
        assert differ(gradient(factors[name]), gradient(copy)) <= 1e-5 * largest, name


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def corner(row: Row) -> tuple[int, int]:
    """Left and top of the middle 64 x 64 pixels; no picture is scaled."""
    width, height = (64, 64) if row.view.is_prior else SIZES[row.view.photo.name]
    return (width - 64) // 2, (height - 64) // 2


@torch.no_grad()
def latents(pipeline: Any, rows: list[Row]) -> torch.Tensor:
    vae, found = pipeline.vae, []
    for row in rows:
        left, top = corner(row)
        cut = row.view.photo.open().crop((left, top, left + 64, top + 64))
        posterior = vae.encode(bucketing.to_pixels(cut)[None]).latent_dist
        noise = row.noise((4, 8, 8), "posterior")
        found.append(posterior.mean[0] + posterior.std[0] * noise)
    z_BCHW = torch.stack(found)
    if vae.config.latents_mean is None:
        return z_BCHW * vae.config.scaling_factor
    mean, std = (
        torch.tensor(each)[None, :, None, None]
        for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (z_BCHW - mean) * vae.config.scaling_factor / std


def by_hand(
    pipeline: Any,
    batch: Batch,
    rows: list[Row],
    factors: dict[str, torch.Tensor],
    gamma: float | None,
) -> torch.Tensor:
    """The subject's loss and the prior's, weighted, with adapters as plain sums of weights."""
    added: dict[str, Any] = {}
    states_BLD, pooled_BP = said(pipeline, batch.captions, factors)
    if pooled_BP is not None:
        ids = []
        for row in rows:
            width, height = (64, 64) if row.view.is_prior else SIZES[row.view.photo.name]
            left, top = corner(row)
            ids.append([height, width, top, left, 64, 64])
        added = {"text_embeds": pooled_BP, "time_ids": torch.tensor(ids)}

    def unet(x_BCHW: torch.Tensor, timesteps_B: torch.Tensor) -> torch.Tensor:
        weights = summed(pipeline.unet, "unet", factors)
        words = {"encoder_hidden_states": states_BLD, "added_cond_kwargs": added}
        return functional_call(pipeline.unet, weights, (x_BCHW, timesteps_B), words).sample

    z, noise, scheduler = batch.z_BCHW, batch.noise_BCHW, pipeline.scheduler
    if type(scheduler).__name__.startswith("EDM"):
        sigma, data = batch.levels_B[:, None, None, None], scheduler.config.sigma_data
        noisy = z + sigma * noise
        raw = unet(scheduler.precondition_inputs(noisy, sigma), batch.levels_B.log() / 4)
        denoised = scheduler.precondition_outputs(noisy, raw, sigma)
        weighted = (sigma**2 + data**2) / (sigma * data) ** 2 * (denoised - z) ** 2
    else:
        ddpm: Any = DDPMScheduler.from_config(scheduler.config)
        steps_B = batch.levels_B.long()
        predicted = unet(ddpm.add_noise(z, noise, steps_B), steps_B)
        alphas_B = ddpm.alphas_cumprod[steps_B][:, None, None, None]
        snr_B = alphas_B / (1 - alphas_B)
        weight_B = torch.ones(()) if gamma is None else snr_B.clamp(max=gamma) / snr_B
        weighted = weight_B * (predicted - noise) ** 2
    of_prior = torch.tensor([row.view.is_prior for row in rows])
    return torch.stack([weighted[~of_prior].mean(), PRIOR_WEIGHT * weighted[of_prior].mean()])


def said(
    pipeline: Any, captions: list[str | None], factors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the text encoders say; SDXL's makers mean zeros by no text."""
    xl = hasattr(pipeline, "text_encoder_2")
    states, pooled_BP = [], None
    for suffix in ("", "_2") if xl else ("",):
        part = f"text_encoder{suffix}"
        encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, f"tokenizer{suffix}")
        encoder.requires_grad_(False)
        words = [caption or "" for caption in captions]
        ids = tokenizer(
            words, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        asked = {"output_hidden_states": True}
        output = functional_call(encoder, summed(encoder, part, factors), (ids,), asked)
        states.append(output.hidden_states[-2] if xl else output.last_hidden_state)
        pooled_BP = output.text_embeds if suffix else None
    if not xl:
        return states[0], None
    assert pooled_BP is not None
    there_B1 = torch.tensor([[caption is not None] for caption in captions])
    return torch.cat(states, -1) * there_B1[:, :, None], pooled_BP * there_B1


def summed(network: Any, part: str, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every adapted weight W + alpha / rank B A, by its name in `network`."""
    found = {}
    for name, down in factors.items():
        if not name.endswith("lora_A.default.weight") or not is_of(name, part):
            continue
        up = factors[name.replace("lora_A", "lora_B")]
        layer = name.removesuffix(".lora_A.default.weight").split(".", 1 if part == "unet" else 2)
        weight = network.get_submodule(layer[-1]).weight
        found[f"{layer[-1]}.weight"] = weight + ALPHA / RANK * up @ down
    assert found
    return found


def is_of(name: str, part: str) -> bool:
    """Whether a factor is of this part: text encoders are numbered from 0 in checkpoints."""
    numbers = {"unet": "unet.", "text_encoder": "text_encoders.0."}
    return name.startswith(numbers.get(part, "text_encoders.1."))


@pytest.mark.parametrize("saves", [False, True])
def test_the_attention_kernel(
    folders: dict[str, Path], photos: Path, saves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.attention` holds in training, also where layers run again for their gradients."""
    config = settings(folders["sdxl"], photos, steps=1, gradient_checkpointing=saves)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"attention": "math"})}
    )
    seen: list[bool] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    tuned, _ = fit(config)
    num_layers = len(tuned.unet.attn_processors)
    assert seen.count(False) == num_layers * (2 if saves else 1)


def test_an_attention_kernel_that_there_is_not(folders: dict[str, Path], photos: Path) -> None:
    config = settings(folders["sdxl"], photos, steps=1)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"attention": "efficient"})}
    )
    with pytest.raises(BadInput, match=r"model\.attention efficient cannot train on this device"):
        fit(config)
