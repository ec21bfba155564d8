"""From a body to a request: defaults, limits, sizes, and LoRAs of the right model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rayjobs.diffusion.economy.plan import REUSE_COST
from rayjobs.diffusion.facts import STEPS, Usual
from rayjobs.diffusion.sampler_names import Prediction
from rayjobs.models.facts import ModelFacts
from serve.config import ServeConfig
from serve.engine.request_state import estimate
from serve.errors import ApiError
from serve.ingress.requests import ImagesRequestBuilder, describe
from serve.ingress.schemas import EditBody, GenerateBody, PassUse
from serve.protocol import ImagesRequest, Pixels
from serve.registry import Entry, Registry, Weights

SDXL = ModelFacts("sdxl", side=512, multiple=8)
LIMITS = {
    "max_pixels": 512 * 768,
    "max_side": 1024,
    "max_steps": 40,
    "max_n": 3,
    "max_prompt_chars": 20,
    "max_loras": 2,
    "max_lora_scale": 2.0,
    "max_guidance_scale": 20.0,
    "max_deadline_s": 60.0,
}


FEW = ModelFacts("sdxl", 512, 8, Prediction("v_prediction", zero_snr=True), Usual(4, 1.0, "Turbo"))


@pytest.fixture
def builder() -> ImagesRequestBuilder:
    """Two models, one with unknown facts, and LoRAs of the first, of the second and of any."""
    models = [{"name": "sdxl", "uri": "starter"}, {"name": "hub", "uri": "some/model"}]
    config = ServeConfig.model_validate({"models": models, "limits": LIMITS})
    registry = Registry(config)
    weights = {"sdxl": Weights("sdxl"), "hub": Weights("hub")}
    entries = [
        Entry("sdxl", "model", weights["sdxl"], facts=SDXL),
        Entry(
            "edm",
            "model",
            Weights("edm"),
            facts=ModelFacts("sdxl", 512, 8, Prediction(is_edm=True)),
        ),
        Entry("few", "model", Weights("few"), facts=FEW),
        Entry("fill", "model", Weights("fill"), facts=replace(SDXL, needs_mask=True)),
        Entry("hub", "model", weights["hub"]),
        Entry("dog", "lora", weights["sdxl"], lora="dog", base="sdxl"),
        Entry("far", "lora", weights["hub"], lora="far", base="hub"),
        Entry("any", "lora", None, lora="any"),
    ]
    registry._fixed = {entry.name: entry for entry in entries}
    return ImagesRequestBuilder(config, registry)


def generation(builder: ImagesRequestBuilder, **keys: Any) -> ImagesRequest:
    body = GenerateBody.model_validate({"prompt": "a cat", **keys})
    builder.check(body)
    return builder.build_generation(body, "me", "id-1")


def refusal(work: Callable[..., Any], *args: Any, **keys: Any) -> tuple[int, str | None, str]:
    with pytest.raises(ApiError) as error:
        work(*args, **keys)
    return error.value.status, error.value.param, error.value.message


def test_what_is_left_out_has_defaults(builder: ImagesRequestBuilder) -> None:
    request = generation(builder, seed=2**63 - 1, n=2)
    assert (request.id, request.caller, request.model) == ("id-1", "me", "sdxl")
    assert (request.width, request.height, request.steps) == (512, 512, STEPS)
    assert request.seeds == (2**63 - 1, 0)
    assert (request.guidance_scale, request.deadline_s) == (None, 60.0)
    assert generation(builder).seeds != generation(builder).seeds


def test_a_model_without_facts_chooses_its_size(builder: ImagesRequestBuilder) -> None:
    request = generation(builder, model="hub", sampler="edm_euler")
    assert (request.width, request.height) == (None, None)


def test_a_deadline_can_only_be_shorter(builder: ImagesRequestBuilder) -> None:
    assert generation(builder, deadline_s=5).deadline_s == 5
    assert generation(builder, deadline_s=500).deadline_s == 60


def test_a_models_own_kind_decides_its_defaults(builder: ImagesRequestBuilder) -> None:
    assert generation(builder, model="few").steps == 4
    assert generation(builder, model="few", num_inference_steps=7).steps == 7
    entry = builder.registry.find("few")
    assert entry is not None
    told = describe(entry, builder.limits, loaded=True)
    assert (told["defaults"]["num_inference_steps"], told["defaults"]["guidance_scale"]) == (4, 1.0)
    assert "heun" not in told["samplers"]
    assert "euler" in told["samplers"]


def test_progress_needs_a_stream(builder: ImagesRequestBuilder) -> None:
    assert not generation(builder, progress=True).progress
    assert generation(builder, progress=True, stream=True).progress


@pytest.mark.parametrize(
    ("keys", "param", "reason"),
    [
        ({"n": 4}, "n", "n is 4; at most 3"),
        ({"num_inference_steps": 41}, "num_inference_steps", "at most 40"),
        ({"guidance_scale": 21}, "guidance_scale", "at most 20"),
        ({"prompt": "x" * 21}, "prompt", "21 characters"),
        ({"negative_prompt": "x" * 21}, "negative_prompt", "21 characters"),
        ({"prompt": "a AND b", "prompt_syntax": "a1111"}, "prompt", "prompt has AND"),
        (
            {"negative_prompt": "<lora:x:1>", "prompt_syntax": "a1111"},
            "negative_prompt",
            "name the file under loras",
        ),
        ({"size": "100x100"}, "size", "multiple of 8"),
        ({"size": "1032x64"}, "size", "at most 1024"),
        ({"size": "776x512"}, "size", "at most 393216"),
        ({"sampler": "edm_euler"}, "sampler", "EDM"),
        ({"sampler": "euler", "model": "edm"}, "sampler", "EDM"),
        ({"sampler": "heun", "model": "few"}, "sampler", "zero terminal SNR; use one of ddim, "),
        ({"guidance_interval": [0.8, 0.2]}, "guidance_interval", "two shares of the schedule"),
        ({"timesteps": [3, 7]}, "timesteps", "timesteps has 7 after 3"),
        ({"timesteps": [9, 3], "num_inference_steps": 3}, "timesteps", "leave steps out"),
        ({"timesteps": [*range(41, 0, -1)]}, "num_inference_steps", "at most 40"),
        (
            {"timesteps": [9, 3], "sampler": "ddim"},
            "sampler",
            "takes no timesteps; use one of ddpm",
        ),
        ({"sigmas": [9, 0], "sampler": "heun"}, "sampler", "takes no sigmas; use one of euler"),
        ({"background": "transparent"}, "background", "Transparent"),
        ({"response_format": "url"}, "response_format", "not configured"),
        ({"partial_images": 1}, "partial_images", "stream=true"),
        ({"loras": [{"name": "dog"}] * 3}, "loras", "at most 2"),
        ({"loras": [{"name": "dog", "scale": -2.5}]}, "loras", "at most 2"),
        ({"loras": [{"name": "far"}]}, "loras", "for another model, hub"),
    ],
)
def test_what_is_over_a_limit_is_refused(
    builder: ImagesRequestBuilder, keys: dict[str, Any], param: str, reason: str
) -> None:
    status, named, message = refusal(generation, builder, **keys)
    assert (status, named) == (400, param)
    assert reason in message


def test_what_is_at_a_limit_is_served(builder: ImagesRequestBuilder) -> None:
    loras = [{"name": "dog", "scale": -2.0}, {"name": "any"}]
    keys = {"size": "768x512", "n": 3, "num_inference_steps": 40, "prompt": "x" * 20}
    request = generation(builder, loras=loras, **keys)
    assert request.loras == (("dog", -2.0), ("any", 1.0))
    assert (request.width, request.height) == (768, 512)
    assert request.prompt_syntax == "plain"
    assert generation(builder, prompt="(a:1.2)", prompt_syntax="a1111").prompt_syntax == "a1111"


def test_what_a_row_leaves_out_and_its_own_schedule(builder: ImagesRequestBuilder) -> None:
    request = generation(builder, guidance_interval=[0.2, 0.8], cache_interval=3)
    assert (request.guidance_interval, request.cache_interval) == ((0.2, 0.8), 3)
    assert (request.timesteps, request.steps) == (None, STEPS)
    request = generation(builder, timesteps=[999, 499], sampler="lcm")
    assert (request.timesteps, request.steps, request.has_schedule) == ((999, 499), 2, True)
    request = generation(builder, sigmas=[9.0, 2.0, 0.0])
    assert (request.sigmas, request.steps, request.cache_interval) == ((9.0, 2.0, 0.0), 2, 1)


def test_work_is_estimated_by_what_is_left_out(builder: ImagesRequestBuilder) -> None:
    def work(**keys: Any) -> float:
        return estimate(generation(builder, num_inference_steps=10, **keys), 512, 8)[1]

    assert work() == 20
    assert work(n=3, guidance_interval=[0.0, 0.5]) == 45
    assert work(cache_interval=2) == pytest.approx(10 + 10 * REUSE_COST)
    assert work(guidance_scale=1, guidance_interval=[0.5, 1.0], cache_interval=10) < 4
    # Half of the steps, of four times as many pixels.
    assert work(size="256x256", passes=[{"scale": 2, "strength": 0.5}]) == 20 + 10 * 4
    guided = [{"scale": 1, "strength": 0.5, "guidance_scale": 3}]
    assert work(guidance_scale=1, passes=guided) == 20 + 10


@pytest.mark.parametrize(
    ("keys", "param"),
    [({"model": "nobody"}, "model"), ({"model": "any"}, "model"), ({"loras": ["x"]}, "loras")],
)
def test_unknown_names_are_not_found(
    builder: ImagesRequestBuilder, keys: dict[str, Any], param: str
) -> None:
    if "loras" in keys:
        keys = {"loras": [{"name": "sdxl"}]}  # a model is no LoRA
    status, named, _ = refusal(generation, builder, **keys)
    assert (status, named) == (404, param)


def grey(width: int, height: int) -> Pixels:
    return Pixels(width, height, bytes(3 * width * height))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 300), (512, 512)), ((400, 200), (736, 352)), ((2000, 20), (1024, 64))],
)
def test_an_edit_has_its_image_s_aspect_ratio(
    builder: ImagesRequestBuilder, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    body = EditBody(prompt="a cat")
    request = builder.build_edit(body, grey(*size), None, "me", "id")
    assert request.init is not None
    assert (request.width, request.height) == expected
    assert (request.init.width, request.init.height) == expected


def test_a_mask_changes_the_default_strength(builder: ImagesRequestBuilder) -> None:
    mask = Pixels(64, 64, bytes(64 * 64), "L")
    plain = builder.build_edit(EditBody(prompt="p"), grey(64, 64), None, "me", "id")
    masked = builder.build_edit(EditBody(prompt="p"), grey(64, 64), mask, "me", "id")
    assert (plain.strength, masked.strength) == (0.6, 1.0)
    assert masked.mask is not None
    assert (masked.mask.width, masked.mask.height) == (512, 512)


def test_an_inpainting_model_needs_a_mask(builder: ImagesRequestBuilder) -> None:
    assert refusal(generation, builder, model="fill")[:2] == (400, "model")
    body, mask = EditBody(prompt="p", model="fill"), Pixels(64, 64, bytes(64 * 64), "L")
    told = refusal(builder.build_edit, body, grey(64, 64), None, "me", "id")
    assert told == (
        400,
        "mask",
        "The model 'fill' only makes masked parts of a picture anew; give a mask, or take another "
        "model.",
    )
    builder.check(body)
    assert builder.build_edit(body, grey(64, 64), mask, "me", "id").mask is not None
    latent = EditBody(prompt="p", passes=[PassUse(via="latent")])
    told = refusal(builder.build_edit, latent, grey(64, 64), mask, "me", "id")
    assert told[:2] == (400, "passes")


def test_a_strength_too_small_for_a_step_is_refused(builder: ImagesRequestBuilder) -> None:
    body = EditBody(prompt="p", strength=0.01, num_inference_steps=10)
    status, param, _ = refusal(builder.build_edit, body, grey(64, 64), None, "me", "id")
    assert (status, param) == (400, "strength")


def test_a_model_is_listed_with_its_sizes_and_limits(builder: ImagesRequestBuilder) -> None:
    listed = describe(builder.entry("sdxl"), builder.limits, loaded=True)
    assert (listed["default_size"], listed["sizes"][0]) == ("512x512", "512x512")
    assert listed["loaded"]
    assert listed["limits"]["max_steps"] == 40
    assert "edm_euler" not in listed["samplers"]
    unknown = describe(builder.entry("hub"), builder.limits, loaded=False)
    assert (unknown["default_size"], unknown["sizes"]) == (None, [])
