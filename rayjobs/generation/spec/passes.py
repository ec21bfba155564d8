"""A job's passes, compared with the models that are to make them before any is loaded.

Owns what is refused, and what the lock says of passes. Knows nothing of rows.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from rayjobs.dataset.records import canonical_json
from rayjobs.diffusion.weights import Weights, locate
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.keys import named
from rayjobs.models.facts import to_source


def check(config: GenerateConfig, model: Weights) -> tuple[str, ...]:
    """The settings of each pass, with the hash of its model if it has its own.

    Raises BadInput for a pass whose model is none that draws over pictures, whose sampler cannot
    draw it or begin from a picture, or that cannot go on with what the pass before made.
    """
    said, before = [], model
    for number, each in enumerate(config.passes):
        key = f"passes.{number}"
        after = model
        if each.model is not None:
            after = named(f"{key}.model", partial(_follower, each.model))
        _check_samplers(number, config, after)
        if each.asked.way != "pixel":
            named(f"{key}.model", partial(_check_latents, before, after))
        if each.denoising_start is not None:
            named(key, partial(_check_handed_over, config, number, before, after))
        settings = each.model_dump(mode="json", exclude={"model"})
        of_model = "" if each.model is None else f"{after.sha256} "
        said.append(of_model + canonical_json(settings).decode())
        before = after
    return tuple(said)


def _follower(uri: str) -> Weights:
    found = locate(replace(to_source(uri), follows=True))
    if found.needs_mask:
        raise ValueError(
            f"{uri} only makes masked parts of pictures anew, and passes have no masks; take "
            "another model"
        )
    if found.single is not None:
        found.load_config_folder()
    return found


def _check_samplers(number: int, config: GenerateConfig, model: Weights) -> None:
    from rayjobs.diffusion.sampler import check_begins_anywhere, resolve

    key = f"passes.{number}.sampler"
    for own in config.parameters.sampler or (config.sampler.name or model.scheduler_name,):
        name, options, _ = _sampled(config, number + 1, own)
        kind, _ = named(key, partial(resolve, name, options, model.prediction))
        named(key, partial(check_begins_anywhere, name, kind))


def _check_latents(before: Weights, after: Weights) -> None:
    from rayjobs.diffusion.refiner.bank import check_same_latents

    one, other = before.vae_config, after.vae_config
    if one is not None and other is not None:
        check_same_latents(one, other)


def _check_handed_over(
    config: GenerateConfig, number: int, before: Weights, after: Weights
) -> None:
    """Raise ValueError unless one's schedule goes on with the other's, with a step on each side."""
    import torch

    from rayjobs.diffusion.refiner.bank import check_same_schedule
    from rayjobs.diffusion.sampler import Sampler, Span, Steps

    starts = [None, *(each.denoising_start for each in config.passes), None]
    for name in config.parameters.sampler or (config.sampler.name or before.scheduler_name,):
        made = []
        for at, model in ((number, before), (number + 1, after)):
            sampler, options, own_steps = _sampled(config, at, name)
            schedule = config.sampler.timesteps, config.sampler.sigmas
            steps = Steps(own_steps or config.sampler.own_steps or model.usual.steps)
            steps = steps if own_steps else Steps(steps.num, *schedule)
            span = Span(None, starts[at], starts[at + 1])
            drawn = Sampler(sampler, options, model.scheduler, steps, span, torch.Generator())
            made.append(drawn.scheduler.config)
        check_same_schedule(*made)


def _sampled(config: GenerateConfig, number: int, name: str) -> tuple[str, dict[str, Any], int]:
    """A pass's sampler, its options, and own steps or 0: of those before where it goes on."""
    job: tuple[str, dict[str, Any], int] = (name, config.sampler.options, 0)
    found = job
    for each in config.passes[:number]:
        sampler, options, steps = job if each.denoising_start is None else found
        if each.sampler is not None or each.sampler_options is not None:
            options = each.sampler_options or {}
        found = each.sampler or sampler, options, each.steps or steps
    return found
