"""A diffusers folder is compared with itself before anything is loaded."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayjobs.diffusion.files import layout
from rayjobs.diffusion.files.folder import read_json
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.weights import STARTER, locate

pytestmark = pytest.mark.model
WEIGHTS = "diffusion_pytorch_model"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["sdxl"], tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(read_json(path) | values))


def rewrite(part: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    (file,) = part.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(part: Path, variant: str = "") -> Path:
    """Turn a part's file into two shards; returns their index."""
    whole = part / f"{WEIGHTS}.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    places, names = {}, sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2]), 1):
        file = f"{WEIGHTS}{variant}-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, part / file)
        places |= dict.fromkeys(half, file)
    index = part / f"{WEIGHTS}.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def absent_shard(folder: Path) -> None:
    shard(folder / "unet")
    (folder / "unet" / f"{WEIGHTS}-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    shard(folder / "unet")
    file = folder / "unet" / f"{WEIGHTS}-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def absent_index(folder: Path) -> None:
    shard(folder / "unet").unlink()


def swapped_shards(folder: Path) -> None:
    index = shard(folder / "unet")
    places = read_json(index)["weight_map"]
    change(index, weight_map=dict.fromkeys(places, places["conv_in.bias"]))


def damage(folder: Path, kind: str) -> None:
    unet, index = folder / "unet", folder / "model_index.json"
    sampler = folder / "scheduler" / "scheduler_config.json"
    lora = {"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": torch.zeros(4, 8)}

    def only_lora(tensors: dict[str, Any]) -> None:
        tensors.clear()
        tensors.update(lora)

    {
        "absent shard": lambda: absent_shard(folder),
        "cut shard": lambda: cut_shard(folder),
        "absent index": lambda: absent_index(folder),
        "swapped shards": lambda: swapped_shards(folder),
        "null encoder": lambda: change(index, text_encoder_2=[None, None]),
        "no encoder": lambda: change(index, text_encoder="x"),
        "no tokenizer": lambda: shutil.rmtree(folder / "tokenizer_2"),
        "half a tokenizer": lambda: (folder / "tokenizer" / "tokenizer.json").unlink(),
        "no config": lambda: (folder / "vae" / "config.json").unlink(),
        "no weights": lambda: (folder / "vae" / f"{WEIGHTS}.safetensors").unlink(),
        "other name": lambda: (unet / f"{WEIGHTS}.safetensors").rename(unet / "m.safetensors"),
        "lost tensor": lambda: rewrite(unet, lambda tensors: tensors.pop(MID)),
        "lost vae tensor": lambda: rewrite(
            folder / "vae", lambda tensors: tensors.pop("decoder.conv_out.bias")
        ),
        "lost projection": lambda: rewrite(
            folder / "text_encoder_2", lambda tensors: tensors.pop("text_projection.weight")
        ),
        "deeper": lambda: rewrite(
            unet, lambda t: t.update({MID.replace("blocks.0.attn", "blocks.1.attn"): t[MID] + 1})
        ),
        "wider": lambda: rewrite(unet, lambda t: t.update({MID: torch.zeros(8, 8)})),
        "another kernel": lambda: rewrite(
            folder / "vae", lambda t: t.update({"decoder.conv_in.weight": torch.zeros(8, 4, 1, 1)})
        ),
        "fewer words": lambda: rewrite(folder / "text_encoder", fewer_words),
        "lora as unet": lambda: rewrite(unet, only_lora),
        "editing": lambda: change(unet / "config.json", in_channels=8),
        "other encoders": lambda: change(unet / "config.json", cross_attention_dim=768),
        "classes": lambda: change(unet / "config.json", num_class_embeds=10),
        "image-guided": lambda: change(unet / "config.json", addition_embed_type="image"),
        "other sizes": lambda: change(unet / "config.json", addition_time_embed_dim=32),
        "other autoencoder": lambda: change(folder / "vae" / "config.json", latent_channels=16),
        "no sampler": lambda: (folder / "scheduler" / "scheduler_config.json").unlink(),
        "two variants": lambda: two_variants(unet),
        "flow": lambda: change(sampler, _class_name="FlowMatchEulerDiscreteScheduler"),
        "flow's sigmas": lambda: change(sampler, use_flow_sigmas=True),
        "another aim": lambda: change(sampler, prediction_type="score"),
    }[kind]()


def fewer_words(tensors: dict[str, Any]) -> None:
    (name,) = (name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name] = tensors[name][:-5].clone()


def two_variants(part: Path) -> None:
    whole = part / f"{WEIGHTS}.safetensors"
    shutil.copy(whole, part / f"{WEIGHTS}.fp16.safetensors")
    whole.rename(part / f"{WEIGHTS}.bf16.safetensors")


REFUSED = {
    "absent shard": "00002-of-00002.safetensors is missing, which the index beside it names",
    "cut shard": "00002-of-00002.safetensors cannot be read",
    "absent index": "index.json is missing, which says what the shards",
    "swapped shards": "names tensors that the shards do not have: .* and .* more",
    "null encoder": r"has no text_encoder_2: model_index.json says \[None, None\]",
    "no encoder": "has no text_encoder: model_index.json says 'x'",
    "no tokenizer": "tokenizer_2 is missing",
    "half a tokenizer": "tokenizer is missing, or has neither vocab.json with merges.txt",
    "no config": "vae/config.json is missing",
    "no weights": r"vae holds no .safetensors weights",
    "other name": f"unet has no {WEIGHTS}.safetensors; it has m.safetensors",
    "lost tensor": rf"lacks 1 of the \d+ tensors that its config.json asks for: {MID}",
    "lost vae tensor": "vae lacks 1 of the .*: decoder.conv_out.bias",
    "lost projection": "text_encoder_2 lacks 1 of the .*: text_projection.weight",
    "deeper": "unet has 1 tensors that its config.json has no place for",
    "wider": rf"unet has 1 tensors of another shape .*: {MID} is \(8, 8\), not \(32, 32\)",
    "another kernel": "vae has 1 tensors of another shape .*: decoder.conv_in.weight is",
    "fewer words": "text_encoder has 1 tensors of another shape .* embeddings.token_embedding",
    "lora as unet": "unet lacks .*; it is a LoRA, .* give it in model.loras",
    "editing": "takes 8 channels, not 4, or 9 as inpainting models do",
    "other encoders": "its text encoders give 64 numbers a token, its UNet reads 768",
    "classes": "its UNet has num_class_embeds 10, an input that upscaling",
    "image-guided": "its UNet has addition_embed_type 'image', an input",
    "other sizes": r"its UNet reads \d+ numbers of text and size, of which it gets \d+",
    "other autoencoder": "its autoencoder has 16 channels, its UNet 4",
    "no sampler": "scheduler_config.json is missing",
    "flow": "is a model of flow matching",
    "flow's sigmas": "is a model of flow matching",
    "another aim": "says that it predicts 'score', which is none of epsilon, v_prediction, sample",
    "two variants": "exists in the variants bf16, fp16; keep one of them",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_told(folder: Path, kind: str) -> None:
    damage(folder, kind)
    with pytest.raises(ValueError, match=REFUSED[kind]):
        print(locate(str(folder)).sha256)


def test_a_lora_is_not_taken_for_a_model(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(4, 4)}, file)
    for uri in (file, tmp_path):
        with pytest.raises(ValueError, match=r"a LoRA, .* give it in model\.loras"):
            locate(str(uri))


def as_variant(part: Path, dtype: torch.dtype, keep: bool) -> None:
    for file in part.glob("*.safetensors"):
        rounded = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(rounded, file.with_suffix(".fp16.safetensors"))
        if not keep:
            file.unlink()


def test_each_part_is_read_in_the_variant_that_it_has(
    folder: Path, folders: dict[str, Path]
) -> None:
    """diffusers takes the variant of every part that has it, or of none."""
    as_variant(folder / "vae", torch.float16, keep=False)
    as_variant(folder / "text_encoder", torch.float16, keep=False)
    as_variant(folder / "unet", torch.float16, keep=True)
    shard(folder / "unet")
    model, plain = load_model(str(folder)), load_model(str(folders["sdxl"]))
    for mine, whole, is_rounded in (
        (model.unet, plain.unet, False),
        (model.vae, plain.vae, True),
        (model.text_encoders[0], plain.text_encoders[0], True),
        (model.text_encoders[1], plain.text_encoders[1], False),
    ):
        for name, tensor in whole.state_dict().items():
            expected = tensor.half().float() if is_rounded else tensor
            assert torch.equal(mine.state_dict()[name], expected), name


@pytest.mark.parametrize("family", ["sdxl", "sd", "playground", "starter"])
def test_layouts_are_those_of_the_modules(folders: dict[str, Path], family: str) -> None:
    root = STARTER if family == "starter" else folders[family]
    for part, wanted in (("unet", layout.unet), ("vae", layout.vae)):
        assert wanted(read_json(root / part / "config.json")) == shapes(
            load_file(root / part / f"{WEIGHTS}.safetensors")
        )


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer_layers_per_block": [0, 2, 4], "mid_block_type": "UNetMidBlock2D"},
        {"time_cond_proj_dim": 256, "layers_per_block": 3},
        {"use_linear_projection": False, "transformer_layers_per_block": 1, "in_channels": 9},
        {"block_out_channels": (64, 32, 96), "conv_in_kernel": 5, "attention_head_dim": 4},
    ],
)
def test_layouts_of_the_kinds_of_sdxl(changes: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "use_linear_projection": True,
        "cross_attention_dim": 64,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config | changes)
    assert layout.unet(dict(unet.config)) == shapes(unet.state_dict())
