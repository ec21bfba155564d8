"""Adapters that differ from row to row, against diffusers with the same adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Lora, Request

pytestmark = pytest.mark.model

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
# Apart: of a file with both, diffusers 0.42 loses the attention layers without a word.
OTHERS = ["conv1", "proj_in"]


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random adapters: other ranks, alpha unlike rank, one with text encoder layers."""
    made = []
    kinds = [(2, 2, ATTENTION, False), (4, 8, ATTENTION, True), (3, 1, OTHERS, False)]
    for number, (rank, alpha, layers, with_text) in enumerate(kinds):
        torch.manual_seed(number)
        pipeline = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])
        parts: dict[str, Any] = {}
        targets = {"unet": layers}
        if with_text:
            targets["text_encoder"] = ["q_proj", "out_proj"]
        for name, target in targets.items():
            module = getattr(pipeline, name)
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target)
            module.add_adapter(config)
            for key, weight in module.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.2)
            state = get_peft_model_state_dict(module)
            parts[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
            parts[f"{name}_lora_adapter_metadata"] = config.to_dict()
        folder = tmp_path_factory.mktemp("lora")
        pipeline.save_lora_weights(folder, **parts)
        made.append(folder)
    return made


def request(seed: int, *loras: Lora) -> Request:
    return Request(
        prompt="a photo of a red star", seed=seed, steps=5, guidance_scale=4.0, loras=loras
    )


def test_rows_with_other_adapters_equal_diffusers(
    folders: dict[str, Path], adapters: list[Path]
) -> None:
    a, b, c = (str(path) for path in adapters)
    uses = [
        (),
        (Lora(path=a),),
        (Lora(path=b, scale=0.7),),
        (Lora(path=a, scale=0.5), Lora(path=c, scale=1.2)),
        (Lora(path=c, scale=0.0),),
    ]
    engine = Engine(load_model(str(folders["sdxl"])), max_rows=len(uses))
    requests = [request(seed, *use) for seed, use in enumerate(uses)]
    results = {r.request.seed: r for r in engine.generate(requests, keep_pixels=True)}
    base = results[4].pixels
    for seed, use in enumerate(uses):
        expected = reference(folders["sdxl"], seed, use)
        assert results[seed].error is None
        assert (results[seed].pixels - expected).abs().max() <= 1e-4
        plain = reference(folders["sdxl"], seed, ())
        if use and use[0].scale:
            assert (results[seed].pixels - plain).abs().max() > 1e-3  # the adapter does act
    assert (base - reference(folders["sdxl"], 4, ())).abs().max() <= 1e-4


def reference(folder: Path, seed: int, use: tuple[Lora, ...]) -> torch.Tensor:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for number, lora in enumerate(use):
        pipeline.load_lora_weights(lora.path, adapter_name=str(number))
    if use:
        names = [str(number) for number in range(len(use))]
        pipeline.set_adapters(names, [lora.scale for lora in use])
    asked = request(seed)
    return pipeline(
        asked.prompt,
        num_inference_steps=asked.steps,
        guidance_scale=4.0,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="pt",
    ).images[0]


def test_a_neighbours_adapter_moves_no_bit(folders: dict[str, Path], adapters: list[Path]) -> None:
    model = load_model(str(folders["sdxl"]))
    lora = Lora(path=str(adapters[1]))
    (alone,) = Engine(model, max_rows=2).generate([request(0)], keep_pixels=True)
    both = Engine(model, max_rows=2).generate([request(0), request(1, lora)], keep_pixels=True)
    beside = next(result for result in both if not result.request.loras)
    assert torch.equal(alone.pixels, beside.pixels)


def test_bad_adapters_fail_their_row_alone(
    folders: dict[str, Path], adapters: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    bad = [str(tmp_path / "missing.safetensors"), str(tmp_path / "notes.txt")]
    requests = [request(n, Lora(path=path)) for n, path in enumerate([*bad, str(adapters[0])])]
    engine = Engine(load_model(str(folders["sdxl"])), max_rows=4)
    errors = {r.request.seed: r.error for r in engine.generate(requests)}
    assert "does not exist" in errors[0]
    assert "not a .safetensors file" in errors[1]
    assert errors[2] is None


def test_an_adapter_of_another_model_is_refused(
    folders: dict[str, Path], adapters: list[Path]
) -> None:
    engine = Engine(load_model(str(folders["sd"])))
    for _ in range(2):  # asked for again it is refused again, not half of it used
        (result,) = engine.generate([request(0, Lora(path=str(adapters[0])))])
        assert "is for another model" in result.error
