"""One description of how a model is loaded, and of what its files tell, for all programs."""

from dataclasses import fields
from pathlib import Path

import pytest

from rayjobs.config import BadInput
from rayjobs.diffusion.model import ModelOptions
from rayjobs.diffusion.weights import locate
from rayjobs.models.facts import ModelFacts, find_weights, read_facts
from rayjobs.models.loading import load, load_weights
from rayjobs.models.options import LoadOptions, ModelConfig


def test_keys_and_engine_options_are_the_same() -> None:
    options = ModelOptions()
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    assert values.pop("onednn") is True
    assert LoadOptions().model_dump() == values


@pytest.mark.parametrize("family", ["sdxl", "sd", "playground"])
def test_files_tell_what_the_loaded_model_tells(folders: dict[str, Path], family: str) -> None:
    uri = str(folders[family])
    model = load(ModelConfig(uri=uri, dtype="float32"))
    facts, weights = read_facts(uri), locate(uri)
    assert facts.family == weights.family == model.family
    assert facts.side == weights.default_side == model.default_side
    assert facts.is_edm == weights.is_edm == model.is_edm
    assert facts.guidance_scale == model.default_guidance_scale
    assert facts.multiple == max(8, model.vae_scale)


def test_keys_reach_the_engine(folders: dict[str, Path]) -> None:
    options = LoadOptions(dtype="bfloat16", vae_dtype="float32", vae_tiling=True)
    model = load_weights(str(folders["sdxl"]), options, onednn=False)
    assert (str(model.dtype), str(model.vae.dtype)) == ("torch.bfloat16", "torch.float32")
    assert model.vae.use_tiling
    assert not model.options.onednn


def test_what_is_no_model_has_no_facts_and_is_refused_by_its_key(tmp_path: Path) -> None:
    assert read_facts(str(tmp_path)) == read_facts("some/hub-id") == ModelFacts()
    with pytest.raises(BadInput, match=r"^model\.uri: model '.*' is not a diffusers folder"):
        find_weights(str(tmp_path))
