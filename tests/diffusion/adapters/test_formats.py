"""Every adapter format that tools write: right to the formula in a mixed batch, or refused."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from rayjobs.diffusion.adapters import notes
from rayjobs.diffusion.adapters.bank import LoraBank
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.diffusion.row import prepare_row
from rayjobs.diffusion.weights import sha256_of
from tests.diffusion.adapters import formats_kohya, formats_peft
from tests.diffusion.adapters.formats import FORMATS
from tests.diffusion.adapters.made import CONV, QUERY, SGM, Made, kohya, merged, random


@pytest.fixture
def bank(tiny: Model) -> Iterator[LoraBank]:
    bank = LoraBank(tiny)
    yield bank
    bank.detach()


def of(model: Model) -> dict[tuple[str, str], Any]:
    encoders = zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False)
    parts = {"unet": model.unet, **dict(encoders)}
    return {(part, name): m for part, root in parts.items() for name, m in root.named_modules()}


def make(model: Model, kind: Callable[[Made], None], seed: int = 0) -> Made:
    torch.manual_seed(seed)
    made = Made(of(model))
    kind(made)
    return made


def write(made: Made, folder: Path, name: str = "adapter.safetensors") -> str:
    if made.config is not None:
        folder = folder / "peft"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(made.config))
        name = "adapter_model.safetensors"
    save_file(made.tensors, folder / name, made.header or None)
    return str(folder if made.config is not None else folder / name)


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


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        formats_kohya.put_kohya(made, QUERY, kohya(QUERY))
        change(made.tensors)

    return kind


def only(**tensors: torch.Tensor) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        made.tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items()}

    return kind


def of_another(header: dict[str, str]) -> Callable[[Made], None]:
    def kind(made: Made) -> None:
        formats_kohya.kohya_text_encoders(made)
        made.header = header

    return kind


def twice(made: Made) -> None:
    formats_kohya.put_kohya(made, QUERY, kohya(QUERY))
    formats_kohya.put_kohya(made, QUERY, f"lora_unet_{SGM[QUERY]}")


Q = kohya(QUERY)
TE = "text_model_encoder_layers_1_self_attn_q_proj"
REFUSED: dict[str, tuple[Callable[[Made], None], str]] = {
    "no up factor": (damaged(lambda t: t.pop(f"{Q}.lora_up.weight")), "its up is missing"),
    "no down factor": (damaged(lambda t: t.pop(f"{Q}.lora_down.weight")), "its down is missing"),
    "alpha alone": (
        damaged(lambda t: t.update({f"{kohya(CONV)}.alpha": torch.ones(())})),
        "unet.down_blocks.1.resnets.0.conv1: its factors are missing",
    ),
    "magnitude alone": (only(**{f"{Q}__dora_scale": random(32, 1)}), "its factors are missing"),
    "half a LoHa": (only(**{f"{Q}__hada_w1_a": random(32, 2)}), "its hada_w1_b is missing"),
    "half a LoKr": (only(**{f"{Q}__lokr_w1": random(4, 4)}), "its lokr_w2_a is missing"),
    "NaN": (damaged(lambda t: t[f"{Q}.lora_up.weight"].fill_(float("nan"))), "NaN or infinity"),
    "int8": (
        damaged(lambda t: t.update({f"{Q}.lora_up.weight": torch.ones(32, 3).char()})),
        "is quantized",
    ),
    "scaled fp8": (
        damaged(lambda t: t.update({f"{Q}.scale_weight": random(2)})),
        "save it in fp16",
    ),
    "an unknown tensor": (
        damaged(lambda t: t.update({f"{Q}.lora_magic": random(2)})),
        "lora_magic' is of no known adapter format",
    ),
    "a layer named twice": (twice, "are both for unet.down_blocks.1"),
    "an unknown layer": (
        damaged(lambda t: t.update({"lora_unet_down_blocks_7_conv.alpha": random(1)})),
        "has no layer for",
    ),
    "another width": (
        only(**{f"{Q}__lora_down__weight": random(2, 40), f"{Q}__lora_up__weight": random(40, 2)}),
        "do not fit a weight",
    ),
    "another width of a LoHa": (
        only(
            **{
                f"{Q}__hada_w{n}_{s}": random(*size)
                for n in (1, 2)
                for s, size in (("a", (16, 2)), ("b", (2, 64)))
            }
        ),
        "do not fit",
    ),
    "another width of a LoKr": (
        only(**{f"{Q}__lokr_w1": random(4, 4), f"{Q}__lokr_w2": random(9, 9)}),
        "do not fit a weight",
    ),
    "another width of a difference": (only(**{f"{Q}__diff": random(16, 64)}), "do not fit"),
    "text encoder of SD 1": (
        only(
            **{
                f"lora_te_{TE}__lora_down__weight": random(2, 32),
                f"lora_te_{TE}__lora_up__weight": random(32, 2),
            }
        ),
        "an adapter for Stable Diffusion 1.x or 2.x; this model is SDXL",
    ),
    "SD 1 by its header": (of_another({"ss_base_model_version": "sd_v1"}), "this model is SDXL"),
    "SD 1 by the specification": (
        of_another({"modelspec.architecture": "stable-diffusion-v1/lora"}),
        "this model is SDXL",
    ),
    "OFT": (only(**{f"{Q}__oft_blocks": random(4, 8, 8)}), "an OFT (orthogonal) adapter; merge it"),
    "BOFT": (only(**{f"{Q}__boft_R": random(4, 8, 8)}), "BOFT"),
    "(IA)3": (only(**{f"{Q}__weight": random(32), f"{Q}__on_input": torch.tensor(0)}), "(IA)3"),
    "GLoRA": (only(**{f"{Q}__a1__weight": random(2, 2)}), "a GLoRA adapter; merge it"),
    "FLUX": (
        only(**{"lora_unet_double_blocks_0_img_attn_proj__lora_down__weight": random(2, 2)}),
        "of a transformer model",
    ),
    "SD3": (
        only(**{"transformer__transformer_blocks__0__attn__to_q__lora_A__weight": random(2, 2)}),
        "of a transformer model",
    ),
    "a textual inversion": (only(emb_params=random(2, 32)), "a textual inversion, no LoRA"),
    "a whole model": (
        only(**{"model__diffusion_model__out__2__weight": random(4, 16, 3, 3)}),
        "give the file as the model",
    ),
    "nothing": (only(), "it holds no tensors"),
}


@pytest.mark.parametrize(("kind", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused_with_a_way_out(
    kind: Callable[[Made], None], reason: str, tiny: Model, bank: LoraBank, tmp_path: Path
) -> None:
    path = write(make(tiny, kind), tmp_path)
    with pytest.raises(ValueError, match=f"^LoRA adapter.safetensors: .*{re.escape(reason)}"):
        bank.load(path)
    assert bank.num_bytes == 0


def test_a_cut_file_is_refused(tiny: Model, bank: LoraBank, tmp_path: Path) -> None:
    path = Path(write(make(tiny, formats_kohya.dora), tmp_path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        bank.load(str(path))


def test_what_is_used_but_not_as_meant_is_said(tiny: Model, bank: LoraBank, tmp_path: Path) -> None:
    dora = bank.load(write(make(tiny, formats_kohya.dora), tmp_path, "dora.safetensors"))
    assert bank.warnings(((dora, 1.0),)) == ()
    (warning,) = bank.warnings(((dora, 0.5),))
    assert "dora.safetensors is a DoRA, whose effect is not linear in its scale" in warning
    bundle = bank.load(write(make(tiny, formats_kohya.bundled_embeddings), tmp_path))
    assert "embeddings of sks, which are not used" in bank.warnings(((bundle, 1.0),))[0]


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


@pytest.mark.parametrize(
    ("path", "title", "steps"),
    [
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", "", 4),
        ("sdxl_lightning_8step_lora.safetensors", "", 8),
        ("fast.safetensors", "DMD2 4 step LoRA", 4),
        ("turbo/style.safetensors", "", None),
        ("porsche-911-turbo.safetensors", "", None),
        ("sd_xl_turbo_lora_v1.safetensors", "", 4),
        ("hypersonic-jets.safetensors", "", None),
    ],
)
def test_an_adapter_of_few_steps_is_known_by_what_it_is_called(
    tiny: Model, bank: LoraBank, tmp_path: Path, path: str, title: str, steps: int | None
) -> None:
    made = make(tiny, formats_kohya.kohya_diffusers_names)
    made.header = {"modelspec.title": title}
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    use = ((bank.load(write(made, file.parent, file.name)), 1.0),)
    usual = bank.usual(use)
    assert (
        usual == tiny.usual if steps is None else (usual.steps, usual.guidance_scale) == (steps, 1)
    )
    row = prepare_row(0, Request(prompt="x", seed=0, loras=(Lora(path=str(file)),)), tiny, bank)
    assert (len(row.texts) == 1) == (steps is not None)
    assert not row.warnings
    asked = Request(prompt="x", seed=0, steps=30, loras=(Lora(path=str(file)),))
    assert bool(prepare_row(0, asked, tiny, bank).warnings) == (steps is not None)
