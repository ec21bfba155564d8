"""Single files and parts, loaded: the engine draws from them what diffusers does when told how."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Request
from rayjobs.diffusion.sampler_names import SAMPLERS
from rayjobs.diffusion.weights import Source, locate
from rayjobs.dreambooth.training.objective import EDM, build_objective
from tests import families, ldm

pytestmark = pytest.mark.model
TOLERANCE = 1e-4
MARKS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
EDM_MARKS = {
    "edm_vpred.sigma_max": torch.tensor(120.0),
    "edm_vpred.sigma_min": torch.tensor(0.002),
}
MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
UNET = "model.diffusion_model."


@dataclass(frozen=True)
class Files:
    """A small SDXL: its pipeline, its folder, and its weights under the original names."""

    pipeline: Any
    folder: str
    tensors: ldm.Tensors
    root: Path

    def file(self, name: str, tensors: ldm.Tensors, **metadata: str) -> str:
        return str(ldm.save(self.root / f"{name}.safetensors", tensors, metadata))

    def reference(self, scheduler: Any) -> Any:
        """diffusers' pipeline with these weights and that scheduler."""
        parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
        config = {"add_watermarker": False, "force_zeros_for_empty_prompt": True}
        pipeline = StableDiffusionXLPipeline(**{**parts, **config, "scheduler": scheduler})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("checkpoints")
    pipeline = ldm.build_xl(root)
    pipeline.save_pretrained(root / "folder")
    return Files(pipeline, str(root / "folder"), ldm.tensors(pipeline), root)


def check_drawn(model: Model, pipeline: Any, samplers: list[str | None]) -> None:
    """Rows of several samplers, in one batch, are what the pipeline draws alone."""
    requests = [
        Request(prompt="a red star", seed=n, steps=4 + n, sampler=name, guidance_scale=4.0)
        for n, name in enumerate(samplers)
    ]
    own = pipeline.scheduler
    for result in Engine(model, max_rows=4).generate(requests, keep_pixels=True):
        request = result.request
        if request.sampler is not None:
            kind = getattr(diffusers, SAMPLERS[request.sampler][0])
            pipeline.scheduler = kind.from_config(own.config)
        else:
            pipeline.scheduler = own
        (expected,) = pipeline(
            request.prompt,
            num_inference_steps=request.steps,
            guidance_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="pt",
            height=64,
            width=64,
        ).images
        assert result.error is None
        assert (result.pixels - expected).abs().max().item() <= TOLERANCE, request.sampler


def test_v_prediction_with_zero_terminal_snr(files: Files) -> None:
    uri = files.file("v", files.tensors | MARKS)
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = EulerDiscreteScheduler.from_config(files.pipeline.scheduler.config, **told)
    model = load_model(uri, config=files.folder)
    check_drawn(model, files.reference(scheduler), [None, "ddim", "euler_a", "dpmpp_2m"])
    (result,) = Engine(model).generate([Request(prompt="x", sampler="heun")])
    assert "'heun' does not fit a model of zero terminal SNR; use one of ddim" in str(result.error)
    objective = build_objective(model.scheduler)
    z_1CHW, noise_1CHW = torch.randn(2, 1, 4, 8, 8)
    last = objective.target(z_1CHW, noise_1CHW, torch.tensor([999]))
    assert torch.allclose(last, -z_1CHW, atol=1e-2)


def test_an_inpainting_model_s_file_with_the_folder_of_another(files: Files) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    nine = torch.randn(files.tensors[name].shape[0], 9, 3, 3)
    model = load_model(files.file("nine", files.tensors | {name: nine}), config=files.folder)
    assert model.needs_mask
    assert torch.equal(model.unet.conv_in.weight, nine)


def test_playground_has_the_schedule_and_the_latents_of_its_file(files: Files) -> None:
    marks = {"edm_mean": torch.tensor([MEAN]), "edm_std": torch.tensor([STD])}
    uri = files.file("playground", files.tensors | marks)
    pipeline = files.reference(EDMDPMSolverMultistepScheduler())
    latents = {"latents_mean": MEAN, "latents_std": STD, "scaling_factor": 0.5}
    vae: Any = AutoencoderKL.from_config(files.pipeline.vae.config, **latents)
    vae.load_state_dict(files.pipeline.vae.state_dict())
    pipeline.vae = vae
    model = load_model(uri, config=files.folder)
    check_drawn(model, pipeline, [None, "edm_euler"])
    assert model.default_guidance_scale == locate(Source(uri=uri)).usual.guidance_scale == 3.0
    assert isinstance(build_objective(model.scheduler), EDM)


def test_cosxl_is_an_edm_model_of_v_prediction(files: Files) -> None:
    uri = files.file("cosxl", files.tensors | EDM_MARKS)
    scheduler = EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=120.0,
        sigma_data=1.0,
        prediction_type="v_prediction",
        sigma_schedule="exponential",
    )
    check_drawn(load_model(uri, config=files.folder), files.reference(scheduler), [None])


def unet_of(files: Files, prefix: str) -> ldm.Tensors:
    tensors = {n: tensor for n, tensor in files.tensors.items() if n.startswith(UNET)}
    return {prefix + name.removeprefix(UNET): tensor for name, tensor in tensors.items()}


def whole(files: Files) -> str:
    return files.file("whole", files.tensors)


def only_unet(files: Files) -> str:
    return files.file("unet", unet_of(files, UNET))


def bare_unet(files: Files) -> str:
    return files.file("bare", unet_of(files, ""))


def comfy_unet(files: Files) -> str:
    return files.file("comfy", unet_of(files, "diffusion_model."))


def diffusers_unet(files: Files) -> str:
    return files.file("diffusers", files.pipeline.unet.state_dict())


def unet_folder(files: Files) -> str:
    files.pipeline.unet.save_pretrained(files.root / "unet")
    return str(files.root / "unet")


def without_vae(files: Files) -> str:
    kept = {n: t for n, t in files.tensors.items() if not n.startswith("first_stage")}
    return files.file("without-vae", kept)


def without_an_encoder(files: Files) -> str:
    kept = {n: t for n, t in files.tensors.items() if not n.startswith("conditioner.embedders.1")}
    return files.file("without-encoder", kept)


@pytest.mark.parametrize(
    "make",
    [
        only_unet,
        bare_unet,
        comfy_unet,
        diffusers_unet,
        unet_folder,
        without_vae,
        without_an_encoder,
    ],
)
def test_a_file_takes_what_it_lacks_from_a_base(files: Files, make: Callable[[Files], str]) -> None:
    uri, expected = make(files), load_model(files.folder)
    with pytest.raises(ValueError, match="which has the rest"):
        load_model(uri)
    model = load_model(Source(uri=uri, base=files.folder))
    pairs = zip(modules(model), modules(expected), strict=True)
    for mine, theirs in pairs:
        weights = theirs.state_dict()
        assert mine.state_dict().keys() == weights.keys()
        assert all(torch.equal(t, weights[name]) for name, t in mine.state_dict().items())
    assert model.sha256 != expected.sha256


def modules(model: Model) -> list[torch.nn.Module]:
    return [model.unet, model.vae, *model.text_encoders]


@pytest.mark.parametrize("encoder", ["named", "bare", "open"])
def test_stable_diffusion_whatever_its_encoders_names(
    folders: dict[str, Path], tmp_path: Path, encoder: str
) -> None:
    folder = str(folders["sd"])
    pipeline, _ = families.reference_pipeline(
        folders["sd"], StableDiffusionXLPipeline, StableDiffusionPipeline
    )
    tensors = ldm.tensors(pipeline, open_clip=encoder == "open")
    if encoder == "bare":
        tensors = {name.replace(".text_model.", "."): it for name, it in tensors.items()}
    uri = str(ldm.save(tmp_path / "sd.safetensors", tensors))
    model, expected = load_model(uri, config=folder), load_model(folder)
    single = locate(uri).single
    assert single is not None
    assert single.version == ("sd2" if encoder == "open" else "sd1")
    assert model.default_side == expected.default_side
    assert model.prediction == expected.prediction
    for mine, theirs in zip(modules(model), modules(expected), strict=True):
        weights = theirs.state_dict()
        assert all(torch.equal(t, weights[name]) for name, t in mine.state_dict().items())


def test_plain_float8_is_read_as_it_is(files: Files) -> None:
    rounded = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in files.tensors.items()}
    model = load_model(files.file("fp8", rounded), config=files.folder)
    expected = rounded[f"{UNET}input_blocks.0.0.weight"].float()
    assert torch.equal(model.unet.conv_in.weight, expected)


def test_a_file_that_does_not_fit_its_configuration_is_refused(
    files: Files, folders: dict[str, Path]
) -> None:
    lost = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    cut = files.file("cut", {n: t for n, t in files.tensors.items() if n != lost})
    with pytest.raises(ValueError, match=r"its UNet has \d+ tensors, that of .* is damaged"):
        load_model(cut, config=files.folder)
    deeper = {lost.replace("blocks.0", "blocks.1"): files.tensors[lost]}
    with pytest.raises(ValueError, match="a folder of its own kind"):
        load_model(files.file("deeper", files.tensors | deeper), config=files.folder)
    with pytest.raises(ValueError, match=r"reads texts of 80 numbers a token, that of .* 64"):
        load_model(Source(uri=only_unet(files), base=str(folders["sdxl"])))
    with pytest.raises(ValueError, match=r"base .* is of the family sd; .* of the family sdxl"):
        load_model(Source(uri=only_unet(files), base=str(folders["sd"])))
    with pytest.raises(ValueError, match="is whole; base is for a file that lacks parts"):
        load_model(Source(uri=files.folder, base=files.folder))
