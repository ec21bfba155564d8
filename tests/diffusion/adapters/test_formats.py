"""Every adapter format that tools write: right to the formula in a mixed batch, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from rayjobs.diffusion.adapters import notes
from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.adapters.names import Layers
from rayjobs.diffusion.adapters.reader import read
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.files.identity import sha256_of
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Lora, Request
from tests.diffusion.adapters import formats_kohya, formats_peft
from tests.diffusion.adapters.formats import FORMATS
from tests.diffusion.adapters.made import Made, kohya, make, merged, write

KEY = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)
def test_a_format_is_right_in_a_mixed_batch(
    kind: Callable[[Made], None], tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    """Alone at 1 and at 0.5, beside another adapter, and none, each slot as by its formula."""
    first = make(tiny, kind)
    second = make(tiny, formats_kohya.kohya_every_outer_layer, seed=1)
    for layer in first.weights.keys() | first.biases.keys():  # a neighbour on the same layers
        weight = first.modules[layer].weight
        if weight.ndim > 1 and layer not in second.weights:
            formats_kohya.put_kohya(second, layer[1], _name(*layer), part=layer[0])
    a = bank.load(write(first, tmp_path))
    b = bank.load(write(second, tmp_path, "second.safetensors"))
    uses = [((a, 1.0),), (), ((a, 0.5), (b, 2.0)), ((b, 1.0),)]
    assert first.weights
    for part, name in first.weights.keys() | first.biases.keys():
        module = first.modules[part, name]
        x = _input(module, len(uses))
        with bank.applied(uses):
            outputs = module(x)
        for slot, use in enumerate(uses):
            scales = dict(use)
            weight, bias = module.weight, module.bias
            for made, sha256 in ((first, a), (second, b)):
                if sha256 in scales and (part, name) in made.weights:
                    changed = made.weights[part, name](scales[sha256])
                    weight = weight + (changed - module.weight)
                if sha256 in scales and (part, name) in made.biases:
                    bias = made.biases[part, name](scales[sha256])
            expected = merged(module, weight, bias, x[slot : slot + 1])
            assert (outputs[slot : slot + 1] - expected).abs().max() <= 1e-4, (name, slot)
        plain = module(x)
        assert (outputs[0] - plain[0]).abs().max() > 1e-3, f"{name} is not changed"
        assert torch.equal(outputs[1], plain[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.__name__)
def test_a_format_in_the_weights_is_as_beside_them(
    kind: Callable[[Made], None], tiny: Model, tmp_path: Path
) -> None:
    """Two adapters at two scales in the weights; taken out again, not a bit is left of them."""
    first, second = make(tiny, kind), make(tiny, formats_kohya.kohya_every_outer_layer, seed=1)
    paths = write(first, tmp_path), write(second, tmp_path, "second.safetensors")
    uses = list(zip(paths, (0.5, 2.0), strict=True))
    beside, fused = LoraBank(tiny), LoraBank(tiny)
    use = beside.use_of(uses)
    layers = {
        layer: _input(first.modules[layer], 2) for layer in first.weights.keys() | first.biases
    }
    outputs, plain = {}, {}
    for layer, x in layers.items():
        plain[layer] = first.modules[layer](x)
        with beside.applied([use, use]):
            outputs[layer] = first.modules[layer](x)
    fused.fuse(uses)
    try:
        for layer, x in layers.items():
            assert (first.modules[layer](x) - outputs[layer]).abs().max() <= 1e-4, layer
    finally:
        fused.detach()
        beside.detach()
    assert all(torch.equal(first.modules[layer](x), plain[layer]) for layer, x in layers.items())


def _name(part: str, layer: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    return prefix[part] + layer.replace(".", "_")


def _input(module: Any, num: int) -> torch.Tensor:
    torch.manual_seed(2)
    if isinstance(module, torch.nn.Conv2d):
        return torch.randn(num, module.in_channels, 6, 6)
    if isinstance(module, torch.nn.GroupNorm):
        return torch.randn(num, module.num_channels, 6, 6)
    size = module.weight.shape[-1]
    return torch.randn(num, 5, size)


def test_what_is_used_but_not_as_meant_is_said(tiny: Model, bank: LoraBank, tmp_path: Path) -> None:
    dora = bank.load(write(make(tiny, formats_kohya.dora), tmp_path, "dora.safetensors"))
    assert bank.warnings(((dora, 1.0),)) == ()
    (warning,) = bank.warnings(((dora, 0.5),))
    assert "dora.safetensors is a DoRA, whose effect is not linear in its scale" in warning
    bundle = bank.load(write(make(tiny, formats_kohya.bundled_embeddings), tmp_path))
    assert "embeddings of sks, which are not used" in bank.warnings(((bundle, 1.0),))[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [formats_kohya.dora, formats_kohya.lokr, formats_kohya.norm_layers]
)
def test_an_adapter_at_scale_0_is_as_none(
    kind: Callable[[Made], None], tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    made = make(tiny, kind)
    use = ((bank.load(write(made, tmp_path)), 0.0),)
    for part, name in made.weights:
        x = _input(made.modules[part, name], 2)
        with bank.applied([use, ()]):
            changed = made.modules[part, name](x)
        assert torch.equal(changed, made.modules[part, name](x))


def test_metadata_that_the_tensors_belie_is_said_and_passed_over(
    tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    def kind(made: Made) -> None:
        formats_kohya.put_kohya(made, KEY, kohya(KEY))
        made.header = {"ss_base_model_version": "sd_v1"}

    adapter = bank.load(write(make(tiny, kind), tmp_path))
    (warning,) = bank.warnings(((adapter, 1.0),))
    assert "says in its metadata that it is for Stable Diffusion 1.x" in warning


def test_an_adapter_for_another_prediction_is_said(
    tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    made = make(tiny, formats_kohya.kohya_conv)
    made.header = {"modelspec.prediction_type": "v"}
    use = ((bank.load(write(made, tmp_path)), 1.0),)
    assert "was trained for v_prediction, the model is epsilon" in bank.warnings(use)[0]


def test_an_adapter_of_fewer_blocks_may_be_of_a_distilled_model(tmp_path: Path) -> None:
    """All layers of SSD-1B are SDXL's too: 4 of its 10 transformer blocks."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 10),
            attention_head_dim=4,
            cross_attention_dim=8,
        )
    layers = Layers("sdxl", {"unet": unet})
    for number, covered in enumerate((4, 10)):
        tensors = {}
        for block in range(covered):
            name = f"down_blocks.1.attentions.0.transformer_blocks.{block}.attn1.to_q"
            tensors |= {f"{kohya(name)}.lora_down.weight": torch.ones(2, 32)}
            tensors |= {f"{kohya(name)}.lora_up.weight": torch.ones(32, 2)}
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file)
        said = read(str(file), file, layers).warnings
        assert ["the first 4 of 10 transformer blocks" in warning for warning in said] == (
            [True] if covered == 4 else []
        )


def test_a_replaced_file_is_read_again(tiny: Model, bank: LoraBank, tmp_path: Path) -> None:
    first = bank.load(write(make(tiny, formats_kohya.lokr), tmp_path))
    path = write(make(tiny, formats_kohya.dora), tmp_path)
    second = bank.load(path)
    assert second != first
    assert bank.load(path) == second


@pytest.mark.parametrize("folder", [formats_peft.peft_folder, formats_kohya.kohya_conv])
def test_settings_beside_a_file_are_part_of_its_identity(
    folder: Callable[[Made], None], tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    made = make(tiny, folder)
    path = Path(write(made, tmp_path))
    before = bank.load(str(path))
    if made.config is None:
        assert before == sha256_of(path)
        return
    (path / "adapter_config.json").write_text(json.dumps(made.config | {"lora_alpha": 1}))
    assert notes.file_sha256(path / "adapter_model.safetensors") != before


def test_peft_s_names_are_of_the_part_that_the_folder_names(
    tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    made = make(tiny, lambda _: None)
    layer = made.text_layer("text_encoder_2")
    key = f"base_model.model.{layer}.lora_"
    tensors = {f"{key}A.weight": torch.ones(2, 32), f"{key}B.weight": torch.ones(32, 2)}
    folder = tmp_path / "peft" / "text_encoder_2"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    (found,) = bank.read(str(folder)).changes
    assert (found.part, found.name) == ("text_encoder_2", layer)
    with pytest.raises(ValueError, match="is a folder of text_encoder_2; give each as an adapter"):
        bank.read(str(folder.parent))
    other = folder.rename(tmp_path / "other")
    with pytest.raises(ValueError, match="has no layer for"):
        bank.read(str(other))


@torch.no_grad()
def test_kinds_that_are_no_plain_factors_draw_as_merged_weights_do(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Whole pictures, rows of one batch: a LoKr, a DoRA at 0.5 with a LoHa beside it, none."""
    model = load_model(str(folders["sdxl"]))
    kinds = (formats_kohya.lokr, formats_kohya.dora, formats_kohya.loha)
    made = [make(model, kind) for kind in kinds]
    lokr, dora, loha = (
        write(one, tmp_path, f"{number}.safetensors") for number, one in enumerate(made)
    )
    uses = [
        (Lora(path=lokr),),
        (Lora(path=dora, scale=0.5), Lora(path=loha, scale=2.0)),
        (),
    ]
    engine = Engine(model, max_rows=len(uses))
    asked = [
        Request(prompt="a star", seed=seed, steps=3, guidance_scale=3.0, loras=use)
        for seed, use in enumerate(uses)
    ]
    found = {r.request.seed: r for r in engine.generate(asked, keep_pixels=True)}
    assert any("DoRA" in warning for warning in found[1].warnings)
    files = dict(zip((lokr, dora, loha), made, strict=True))
    for seed, use in enumerate(uses):
        pipeline = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])
        pipeline.set_progress_bar_config(disable=True)
        modules = dict(pipeline.unet.named_modules())
        own = {
            name: module.weight.clone()
            for name, module in modules.items()
            if getattr(module, "weight", None) is not None
        }
        for lora in use:
            for (_, name), changed in files[lora.path].weights.items():
                modules[name].weight += changed(lora.scale) - own[name]
        expected = pipeline(
            "a star",
            num_inference_steps=3,
            guidance_scale=3.0,
            height=64,
            width=64,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pt",
        ).images[0]
        assert (found[seed].pixels - expected).abs().max() <= 1e-4
