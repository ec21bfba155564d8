"""What single files are: read from their headers, by the marks that other tools leave."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rayjobs.diffusion.sampler_names import Prediction
from rayjobs.diffusion.weights import Source, locate
from tests.headers import SD1, SD2, UNET, XL, ZERO, Shapes, V, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("shapes", "metadata", "kind", "zero_snr"),
    [
        (XL, {}, "epsilon", False),
        (XL | V | ZERO, {}, "v_prediction", True),
        (XL | V, {}, "v_prediction", False),
        (XL | V, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False),
        (XL, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        (XL | ZERO, {"modelspec.predict_key": "v"}, "v_prediction", True),
        (
            XL,
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            "v_prediction",
            True,
        ),
        (SD1, {"modelspec.prediction_type": "v-prediction"}, "v_prediction", False),
        (SD1 | V | ZERO, {}, "v_prediction", True),
        (SD2, {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", False),
        (SD2, {"ss_base_model_version": "sd_v2_768_v"}, "v_prediction", False),
    ],
)
def test_files_say_what_their_unet_predicts(
    file: Path, shapes: Shapes, metadata: dict[str, str], kind: str, zero_snr: bool
) -> None:
    weights = locate(write(file, shapes, metadata))
    assert weights.prediction == Prediction(kind, zero_snr)
    assert weights.prediction.misfit(weights.scheduler_name) is None


@pytest.mark.parametrize(
    ("std", "side", "kind"), [(0.02, 512, "epsilon"), (0.2, 768, "v_prediction")]
)
def test_files_of_2_are_told_apart_by_a_bias(file: Path, std: float, side: int, kind: str) -> None:
    bias = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    values = np.random.default_rng(0).normal(0, std, 640).astype(np.float16)
    weights = locate(write(file, SD2, **{bias: values}))
    assert (weights.default_side, weights.prediction.kind) == (side, kind)


def test_the_training_steps_of_the_first_2_base_tell_that_it_predicts_noise(file: Path) -> None:
    weights = locate(write(file, SD2, global_step=np.array(875_000)))
    assert (weights.default_side, weights.prediction.kind) == (512, "epsilon")


def test_a_caller_may_say_what_a_file_does_not(file: Path, tmp_path: Path) -> None:
    uri = write(file, XL)
    told = locate(Source(uri=uri, prediction_type="v_prediction"))
    assert told.prediction == Prediction("v_prediction")
    assert told.sha256 != locate(uri).sha256
    both = write(tmp_path / "zero.safetensors", XL | ZERO)
    with pytest.raises(ValueError, match="zero terminal SNR and not v-prediction"):
        locate(both)
    told = locate(Source(uri=both, prediction_type="v_prediction"))
    assert told.prediction == Prediction("v_prediction", zero_snr=True)
    assert locate(Source(uri=both, prediction_type="epsilon")).prediction == Prediction()


def test_edm_models_have_their_own_schedule(file: Path, tmp_path: Path) -> None:
    mean, std = np.arange(4, dtype=np.float32), np.arange(4, dtype=np.float32) + 0.5
    playground = locate(write(file, XL, edm_mean=mean, edm_std=std))
    assert playground.scheduler_name == "EDMDPMSolverMultistepScheduler"
    assert (playground.usual.guidance_scale, playground.default_side) == (3.0, 1024)
    assert playground.single is not None
    assert playground.single.latents["latents_std"] == [0.5, 1.5, 2.5, 3.5]
    limits = {"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}
    arrays = {name: np.array(value, np.float32) for name, value in limits.items()}
    cosxl = locate(write(tmp_path / "cosxl.safetensors", XL, **arrays))
    assert cosxl.prediction == Prediction("v_prediction", is_edm=True)
    known = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}
    assert {key: cosxl.scheduler[key] for key in known} == known


def without(shapes: Shapes, *beginnings: str) -> dict[str, Sequence[int]]:
    return {n: shape for n, shape in shapes.items() if not n.startswith(beginnings)}


def first(channels: int, shapes: Shapes = XL) -> dict[str, Sequence[int]]:
    return {**shapes, f"{UNET}input_blocks.0.0.weight": (8, channels, 3, 3)}


REFINER = {
    **without(XL, "conditioner"),
    "conditioner.embedders.0.model.transformer.resblocks.0.ln_1.bias": (8,),
}
BARE_REFINER = {
    **without(XL, "cond", "first"),
    f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 1280),
}
ONLY_UNET = without(XL, "cond", "first")
REFUSED: dict[str, tuple[Shapes, str]] = {
    "refiner": (REFINER, "is an SDXL refiner"),
    "bare refiner": (BARE_REFINER, "is an SDXL refiner"),
    "pix2pix": (first(8, SD1), r"is an editing \(pix2pix\) model"),
    "depth": (first(5, SD2), "is a depth model"),
    "upscaler": (first(7, SD2), "is an upscaling model"),
    "unet": (ONLY_UNET, "holds only a UNet; give model.base"),
    "no vae": (without(XL, "first"), "holds no vae; give model.base"),
    "no encoders": (without(XL, "cond"), "no text_encoder and no text_encoder_2; give model.base"),
    "lora": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 8)}, "is a LoRA"),
    "peft": ({"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": (4, 8)}, "is a LoRA"),
    "dora": ({"lora_unet_mid.dora_scale": (4, 8)}, "is a LoRA"),
    "words": ({"clip_g": (2, 8), "clip_l": (2, 8)}, "learned embeddings; give it in model.words"),
    "controlnet": ({"control_model.time_embed.0.weight": (8, 8)}, "is a ControlNet"),
    "diffusers controlnet": (
        {"controlnet_cond_embedding.conv_in.weight": (8, 8)},
        "is a ControlNet",
    ),
    "averaged": ({"model_ema.diffusion_modelout0weight": (8,)}, "is a file of averaged weights"),
    "vae": ({"first_stage_model.decoder.conv_in.weight": (8, 4)}, "is an autoencoder alone"),
    "bare vae": ({"decoder.conv_in.weight": (8, 4)}, "is an autoencoder alone"),
    "encoder": ({"text_model.final_layer_norm.weight": (8,)}, "is a text encoder alone"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8)}, "is Stable Diffusion 3"),
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": (8,)}, "is FLUX"),
    "flux diffusers": ({"single_transformer_blocks.0.attn.to_q.weight": (8, 8)}, "is FLUX"),
    "flux 2": ({"single_stream_modulation.lin.weight": (8, 8)}, "is FLUX.2"),
    "wan": ({"blocks.0.cross_attn.k.weight": (8, 8), "head.modulation": (8,)}, "is Wan"),
    "hunyuan": (
        {"txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (8,)},
        "is HunyuanVideo",
    ),
    "svd": (
        XL | {f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight": (8,)},
        "is a video model",
    ),
    "kolors": (ONLY_UNET | {"encoder_hid_proj.weight": (8, 8)}, "is Kolors"),
    "scaled fp8": (XL | {"scaled_fp8": (2,)}, "holds weights that are fp8 with scales"),
    "nf4": (XL | {f"{UNET}out.0.weight.absmax": (2,)}, "holds weights that are quantized"),
    "nothing known": ({"layer.weight": (8, 8)}, "holds no UNet of Stable Diffusion or SDXL"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_by_name(file: Path, kind: str) -> None:
    shapes, told = REFUSED[kind]
    with pytest.raises(ValueError, match=told) as caught:
        locate(write(file, shapes))
    assert str(file) in str(caught.value)


def test_whole_numbers_are_no_weights(file: Path) -> None:
    name = f"{UNET}middle_block.0.in_layers.2.weight"
    with pytest.raises(ValueError, match=r"whole numbers \(I8\)"):
        locate(write(file, XL, **{name: np.zeros((8, 8), np.int8)}))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"PK\x03\x04" + bytes(60), "is a pickle"),
        (b"\x80\x02}q\x00." + bytes(60), "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>Log in</title>" + bytes(40), "is a web page"),
        (b"GGUF" + bytes(60), "is a GGUF file"),
        (b"", "is empty"),
        (struct.pack("<Q", 2) + b"{}", "holds no UNet"),
        (struct.pack("<Q", 99) + json.dumps({"a": 1}).encode(), "cannot be read"),
    ],
)
def test_files_of_other_formats_are_told(file: Path, data: bytes, told: str) -> None:
    file.write_bytes(data)
    with pytest.raises(ValueError, match=told):
        locate(str(file))


def test_a_file_by_another_name_is_told_its_own(file: Path, tmp_path: Path) -> None:
    write(file, XL)
    with pytest.raises(ValueError, match=r"is a safetensors file; name it old\.safetensors"):
        locate(str(file.rename(tmp_path / "old.ckpt")))


@pytest.mark.parametrize(
    ("title", "steps", "kind"),
    [
        ("SDXL Turbo 1.0", 4, "Turbo"),
        ("dreamshaper_lightning_8step", 8, "Lightning"),
        ("Hyper-SDXL 2-steps", 2, "Hyper"),
        ("DMD2", 4, "DMD2"),
        ("hyperrealism lightningbolt", 30, None),
    ],
)
def test_distilled_models_are_known_by_their_titles(
    file: Path, title: str, steps: int, kind: str | None
) -> None:
    usual = locate(write(file, XL, {"modelspec.title": title})).usual
    assert (usual.kind, usual.steps) == (kind, steps)
    assert usual.guidance_scale == (5.0 if kind is None else 1.0)
    spacing = "leading" if kind in (None, "DMD2") else "trailing"
    assert locate(str(file)).scheduler["timestep_spacing"] == spacing
    own = "LCMScheduler" if kind == "DMD2" else "EulerDiscreteScheduler"
    assert locate(str(file)).scheduler_name == own
    warning = usual.warning(30, 5.0)
    assert warning is None if kind is None else "30 steps and guidance 5 spoil" in str(warning)
    assert usual.warning(steps, usual.guidance_scale) is None


def test_a_unet_that_takes_guidance_is_of_lcm(file: Path) -> None:
    usual = locate(write(file, XL | {f"{UNET}time_embed.cond_proj.weight": (8, 8)})).usual
    assert (usual.kind, usual.steps, usual.guidance_scale) == ("LCM", 4, 8.0)


@pytest.mark.parametrize(
    ("name", "kind", "steps"),
    [
        ("sdxl_lightning_8step_unet", "Lightning", 8),
        ("dreamshaperXL_lightningDPMSDE", "Lightning", 4),
        ("juggernautXL_v9Rdphoto2Lightning", "Lightning", 4),
        ("sd_xl_turbo_1.0_fp16", "Turbo", 4),
        ("Hyper-SDXL-2steps", "Hyper", 2),
        ("porsche-911-turbo", None, 30),
        ("hyperrealXL", None, 30),
    ],
)
def test_distilled_models_are_known_by_their_file_names(
    tmp_path: Path, name: str, kind: str | None, steps: int
) -> None:
    found = locate(write(tmp_path / f"{name}.safetensors", XL))
    assert (found.usual.kind, found.usual.steps) == (kind, steps)
    assert found.prediction == Prediction()


def test_models_for_one_step(tmp_path: Path) -> None:
    lightning = write(tmp_path / "sdxl_lightning_1step_x0.safetensors", XL)
    assert locate(lightning).prediction == Prediction("sample")
    assert locate(lightning).usual.timesteps is None
    for name, level in {"Hyper-SDXL-1step-Unet": 800, "dmd2_sdxl_1step_unet_fp16": 399}.items():
        found = locate(write(tmp_path / f"{name}.safetensors", XL))
        assert (found.usual.steps, found.usual.timesteps) == (1, (level,))
        assert found.scheduler_name == "LCMScheduler"


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("    parameterization: v  # as trained\n", "v_prediction"),
        ("    parameterization: eps\n", "epsilon"),
        ("    # parameterization: v\n", "epsilon"),
    ],
)
def test_settings_beside_a_file_are_read(file: Path, setting: str, kind: str) -> None:
    uri = write(file, SD1)
    plain = locate(uri).sha256
    file.with_suffix(".yaml").write_text(setting)
    assert locate(uri).prediction == Prediction(kind)
    assert (locate(uri).sha256 == plain) == (kind == "epsilon")
    told = write(file, SD1, {"modelspec.prediction_type": "epsilon"})
    assert locate(told).prediction == Prediction(), "the file's own word counts before"


def test_what_no_sampler_draws_is_refused(file: Path) -> None:
    uri = write(file, XL, {"modelspec.prediction_type": "rectified flow"})
    with pytest.raises(ValueError, match="is a model of flow matching"):
        locate(uri)
    uri = write(file, XL, {"modelspec.predict_key": "score"})
    with pytest.raises(ValueError, match=r"says that it predicts 'score', .* model.prediction_typ"):
        locate(uri)
    assert locate(Source(uri=uri, prediction_type="epsilon")).prediction == Prediction()
