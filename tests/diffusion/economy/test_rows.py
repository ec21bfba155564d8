"""Rows that leave guidance and deep blocks out at times, against loops written with diffusers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.request import Lora, Request, Result
from tests.families import reference_pipeline

pytestmark = pytest.mark.model

STEPS = 6
GUIDANCE = 4.0
TOLERANCE = 1e-4


def request(seed: int, **settings: Any) -> Request:
    return Request(
        prompt=f"a photo of a red star {seed}",
        seed=seed,
        steps=STEPS,
        sampler="euler",
        guidance_scale=GUIDANCE,
        **settings,
    )


def divided(unet: Any, x: Any, t: Any, text: Any, added: Any, deep: Any = None) -> tuple[Any, Any]:
    """The tests' own forward of a UNet of two levels; given `deep`, of the outer one alone."""
    time = unet.time_embedding(unet.time_proj(t.expand(len(x))).to(x.dtype))
    if added is not None:
        sizes = unet.add_time_proj(added["time_ids"].flatten()).reshape(len(x), -1)
        time = time + unet.add_embedding(torch.cat([added["text_embeds"], sizes], dim=-1))
    outer_down, inner_down = unet.down_blocks
    inner_up, outer_up = unet.up_blocks
    x = unet.conv_in(x)
    skips = [x]
    for resnet in outer_down.resnets:
        skips.append(resnet(skips[-1], time))
    if deep is None:
        smaller = outer_down.downsamplers[0](skips[-1])
        x, inner = inner_down(smaller, temb=time, encoder_hidden_states=text)
        x = unet.mid_block(x, time, encoder_hidden_states=text)
        deep = inner_up(x, (smaller, *inner), time, encoder_hidden_states=text)
    x = deep
    for resnet in outer_up.resnets:
        x = resnet(torch.cat([x, skips.pop()], dim=1), time)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), deep


def reference(
    pipeline: Any, asked: Request, guided: Sequence[int], computed: Sequence[int]
) -> torch.Tensor:
    """A picture (3, H, W) in 0..1: `guided` steps have guidance, deep blocks run in `computed`."""
    texts, sizes = [], torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    if isinstance(pipeline, StableDiffusionXLPipeline):
        said = pipeline.encode_prompt(asked.prompt, do_classifier_free_guidance=True)
        for text, pooled in ((said[1], said[3]), (said[0], said[2])):
            texts.append((text, {"text_embeds": pooled, "time_ids": sizes}))
    else:
        text, negative = pipeline.encode_prompt(asked.prompt, "cpu", 1, True)
        texts = [(negative, None), (text, None)]
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(asked.seed)
    x = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    kept: list[Any] = [None, None]
    for number, t in enumerate(scheduler.timesteps):
        shown, noises = scheduler.scale_model_input(x, t), [torch.zeros(0)] * 2
        for slot in (0, 1) if number in guided else (1,):
            deep = None if number in computed else kept[slot]
            noises[slot], kept[slot] = divided(pipeline.unet, shown, t, *texts[slot], deep)
        noise = noises[1]
        if number in guided:
            noise = noises[0] + GUIDANCE * (noises[1] - noises[0])
        x = scheduler.step(noise, t, x, return_dict=False)[0]
    decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor, return_dict=False)[0]
    return (decoded[0] / 2 + 0.5).clamp(0, 1)


ALL = range(STEPS)
KINDS: list[tuple[dict[str, Any], Sequence[int], Sequence[int]]] = [
    ({}, ALL, ALL),
    ({"guidance_interval": (0.25, 0.75)}, range(1, 4), ALL),
    ({"cache_interval": 3}, ALL, (0, 3)),
    ({"cache_interval": 4, "guidance_interval": (0.0, 0.4)}, range(2), (0, 4)),
    ({"cache_interval": 5, "guidance_interval": (0.3, 0.9)}, range(1, 5), (0, 1, 5)),
    ({"guidance_interval": (0.1, 0.12)}, (), ALL),
]


def by_seed(results: Any) -> dict[int, Result]:
    found = {result.request.seed: result for result in results}
    assert not [result.error for result in found.values() if result.error]
    return found


@torch.no_grad()
@pytest.mark.parametrize(("kind", "fixed_shape"), [("sdxl", True), ("sd", False)])
def test_each_of_a_mix_equals_its_own_loop(
    folders: dict[str, Path], kind: str, fixed_shape: bool
) -> None:
    pipeline, _ = reference_pipeline(
        folders[kind], StableDiffusionXLPipeline, StableDiffusionPipeline
    )
    requests = [request(seed, **settings) for seed, (settings, _, _) in enumerate(KINDS)]
    engine = Engine(load_model(str(folders[kind])), max_rows=4, fixed_shape=fixed_shape)
    found = by_seed(engine.generate(requests, keep_pixels=True))
    for asked, (settings, guided, computed) in zip(requests, KINDS, strict=True):
        expected = reference(pipeline, asked, guided, computed)
        difference = (found[asked.seed].pixels - expected).abs().max().item()
        assert difference <= TOLERANCE, (settings, difference)
    assert "holds none of the steps" in found[5].warnings[0]
    assert not found[4].warnings


@torch.no_grad()
def test_with_an_adapter(folders: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])
    layers = ["to_q", "to_v", "conv1"]  # the outermost blocks have convolutions alone
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=layers))
    for name, weight in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    state = {
        f"base_model.model.{key}": weight
        for key, weight in get_peft_model_state_dict(pipeline.unet).items()
    }
    from safetensors.torch import save_file

    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "peft_type": "LORA"}')
    lora = Lora(path=str(tmp_path))
    asked = request(3, loras=(lora,), cache_interval=3, guidance_interval=(0.0, 0.75))
    engine = Engine(load_model(str(folders["sdxl"])), max_rows=2)
    found = by_seed(engine.generate([asked, request(4)], keep_pixels=True))
    expected = reference(pipeline, asked, range(4), (0, 3))
    assert (found[3].pixels - expected).abs().max() <= TOLERANCE


def test_neighbours_keep_their_bits(tiny: Model) -> None:
    """Nor do thrifty rows notice who is beside them, nor does naming a default change anything."""
    plain = [request(seed) for seed in range(2)]
    thrifty = [request(10 + seed, **KINDS[kind][0]) for seed, kind in enumerate((1, 2, 4))]
    named = [replace(each, cache_interval=1, guidance_interval=(0.0, 1.0)) for each in plain]

    def drawn(requests: list[Request]) -> dict[int, Result]:
        return by_seed(Engine(tiny, max_rows=4).generate(requests, keep_pixels=True))

    mixed, alone = drawn([*thrifty, *plain]), drawn(plain) | drawn(thrifty[::-1])
    for seed, result in mixed.items():
        assert torch.equal(result.pixels, alone[seed].pixels), seed
    for seed, result in drawn([thrifty[1], *named]).items():
        assert torch.equal(result.pixels, alone[seed].pixels), seed


def test_a_place_that_is_given_back_is_used(tiny: Model) -> None:
    """Four rows without guidance share a call of two rows with it: six calls in place of eight."""
    asked = [
        replace(request(seed, guidance_interval=(0.5, 1.0)), steps=4, prompt="a")
        for seed in range(4)
    ]
    engine, calls = Engine(tiny, max_rows=2), []
    batch: Any = engine._unet_batch
    call = batch._call
    batch._call = lambda x, *rest: calls.append(len(x)) or call(x, *rest)
    by_seed(engine.generate(asked))
    assert calls == [4] * 6


def test_calls_of_the_outermost_blocks_are_full(tiny: Model) -> None:
    """Rows that joined at other times reuse at other times, and still fill their calls."""
    asked = [replace(request(seed, cache_interval=2), steps=4 + seed % 3) for seed in range(24)]
    engine, calls = Engine(tiny, max_rows=4), []
    batch: Any = engine._unet_batch
    call = batch._call
    batch._call = lambda x, *rest: calls.append(len(x)) or call(x, *rest)
    by_seed(engine.generate(asked))
    assert sum(calls) == 2 * sum(each.steps or 0 for each in asked)
    assert sum(calls) / len(calls) > 7.2  # of 8 slots


def test_a_unet_compiled_as_a_whole_keeps_nothing(tiny: Model) -> None:
    model = replace(tiny, options=ModelOptions(compile="full"))
    (result,) = Engine(model).generate([request(0, cache_interval=2)])
    assert "leave cache_interval out or set compile to blocks" in result.error
