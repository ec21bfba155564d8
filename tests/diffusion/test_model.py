"""Loading: identity, precision, layouts, and what is refused."""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import ModelOptions, _vae_dtype, load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler_names import SAMPLERS, Prediction, check_name
from rayjobs.diffusion.weights import Source

pytestmark = pytest.mark.model


def test_the_identity_is_that_of_all_files(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["sdxl"], folder)
    (folder / "README.md").write_text("not part of the pipeline")
    files = sorted(
        [path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in folder.rglob("*")
        if path.is_file() and path.name != "README.md"
    )
    whole = hashlib.sha256(json.dumps(files, separators=(",", ":")).encode()).hexdigest()
    assert load_model(str(folder)).sha256 == whole
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    assert load_model(str(folder)).sha256 != whole


def test_a_folder_with_only_an_fp16_variant_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders["sdxl"], folder)
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    model, plain = load_model(str(folder)), load_model(str(folders["sdxl"]))
    for name, weight in plain.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], weight)


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "dtype"),
    [
        ("cpu", True, torch.float32),
        ("cuda:0", True, torch.bfloat16),
        ("cuda:0", False, torch.float32),  # before Ampere
    ],
)
def test_float16_has_a_wider_autoencoder_where_that_overflows(
    monkeypatch: pytest.MonkeyPatch, device: str, has_bfloat16: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    for overflows, wanted in ((True, dtype), (False, torch.float16)):
        vae = SimpleNamespace(config=SimpleNamespace(force_upcast=overflows))
        assert _vae_dtype(vae, torch.float16, "auto", device) == wanted
        assert _vae_dtype(vae, torch.bfloat16, "auto", device) == torch.bfloat16
        assert _vae_dtype(vae, torch.float16, "float32", device) == torch.float32


def test_float16_keeps_an_overflowing_autoencoder_in_float32(folders: dict[str, Path]) -> None:
    model = load_model(str(folders["sdxl"]), ModelOptions(dtype="float16"))
    assert (model.unet.dtype, model.vae.dtype) == (torch.float16, torch.float32)
    chosen = ModelOptions(dtype="float16", vae_dtype="bfloat16")
    assert load_model(str(folders["sdxl"]), chosen).vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions(attention="math"),
        ModelOptions(channels_last=False),
        ModelOptions(vae_slicing=True, vae_tiling=True),
    ],
    ids=str,
)
def test_options_do_not_change_the_picture(folders: dict[str, Path], options: ModelOptions) -> None:
    request = Request(prompt="a red star", steps=3, guidance_scale=3.0, width=64, height=64)
    pictures = []
    for chosen in (ModelOptions(), options):
        engine = Engine(load_model(str(folders["sdxl"]), chosen), max_rows=2)
        (result,) = engine.generate([request], keep_pixels=True)
        assert result.error is None
        pictures.append(result.pixels)
    assert (pictures[0] - pictures[1]).abs().max() < 1e-4


def test_latents_of_an_init_image_have_the_models_dtype(
    folders: dict[str, Path], picture: Callable[[int], Image.Image]
) -> None:
    engine = Engine(load_model(str(folders["sdxl"]), ModelOptions(dtype="float16")), max_rows=2)
    asked = Request(prompt="a red star", steps=4, guidance_scale=3.0, init_image=picture(0))
    row = engine.add(asked)
    engine.step()
    assert engine.rows[row].latents.dtype == torch.float16


def test_bfloat16_draws_the_same_picture_roughly(folders: dict[str, Path]) -> None:
    request = Request(prompt="a red star", steps=3, guidance_scale=3.0)
    pictures = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine(load_model(str(folders["sdxl"]), ModelOptions(dtype=dtype)), max_rows=2)
        (result,) = engine.generate([request], keep_pixels=True)
        pictures.append(result.pixels)
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02


def test_what_is_not_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"pickle")
    cases = {
        str(tmp_path / "none"): "does not exist",
        str(tmp_path): "has no model_index.json",
        str(tmp_path / "weights.ckpt"): "safetensors.torch.save_file",
    }
    for uri, told in cases.items():
        if uri == str(tmp_path):
            (tmp_path / "weights.ckpt").rename(tmp_path / "weights")
        with pytest.raises(ValueError, match=told):
            load_model(uri)
        if uri == str(tmp_path):
            (tmp_path / "weights").rename(tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="no CUDA device"):
        load_model("starter", ModelOptions(device="cuda"))


def test_a_hub_id_is_fetched_at_its_revision(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(hub_id: str, **options: object) -> Path:
        asked.append((hub_id, options.get("revision")))
        return folders["sdxl"]

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    model = load_model(Source(uri="some/sdxl-turbo", revision="v2"))
    assert asked == [("some/sdxl-turbo", "v2")]
    assert model.sha256 == load_model(str(folders["sdxl"])).sha256
    assert (model.usual.kind, model.usual.steps, model.default_guidance_scale) == ("Turbo", 4, 1.0)
    with pytest.raises(ValueError, match="revision 'v2' is for a hub id, and 'starter' is none"):
        load_model(Source(uri="starter", revision="v2"))


@pytest.mark.parametrize("steps", [None, 20])
def test_a_distilled_model_is_known_by_its_sampler(
    folders: dict[str, Path], tmp_path: Path, steps: int | None
) -> None:
    folder = Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"leading"', '"trailing"'))
    engine = Engine(load_model(str(folder)), max_rows=1)
    row = engine.add(Request(prompt="a red star", steps=steps))
    assert len(engine.rows[row].sampler.timesteps) == (steps or 4)
    assert engine.rows[row].num_slots == 1
    (result,) = engine.generate([])
    told = ("20 steps spoil the pictures of Turbo or Lightning models",)
    assert [warning.split(",")[0] for warning in result.warnings] == list(told if steps else ())


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_without_the_options_that_a_model_needs_are_refused(name: str) -> None:
    """diffusers passes over options that a class does not have, without an error."""
    options = inspect.signature(getattr(diffusers, SAMPLERS[name][0])).parameters
    is_edm = "sigma_data" in options
    for prediction, fits in (
        (Prediction(), not is_edm),
        (Prediction("v_prediction"), "prediction_type" in options and not is_edm),
        (Prediction("v_prediction", zero_snr=True), "rescale_betas_zero_snr" in options),
        (Prediction(is_edm=True), is_edm),
    ):
        if fits:
            assert check_name(name, prediction) == SAMPLERS[name]
        else:
            with pytest.raises(ValueError, match=f"'{name}' does not fit a.*; use one of "):
                check_name(name, prediction)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    requests = [
        Request(prompt="a photo of a red star", seed=n, steps=6, guidance_scale=4.0)
        for n in range(3)
    ]
    seen = []
    for device in ("cpu", "cuda"):
        options = ModelOptions(dtype="float32", device=device)
        results = Engine(load_model("starter", options)).generate(requests, keep_pixels=True)
        seen.append({result.request.seed: result.pixels for result in results})
    for n in range(3):
        assert (seen[0][n] - seen[1][n]).abs().mean() < 5e-3
