"""One description of how a model is loaded, and of what its files tell, for all programs."""

from dataclasses import fields
from pathlib import Path

import pytest

from rayjobs.config import BadInput
from rayjobs.diffusion.model import ModelOptions
from rayjobs.diffusion.sampler_names import Prediction
from rayjobs.diffusion.weights import locate
from rayjobs.models.facts import ModelFacts, find_weights, read_facts, unpinned
from rayjobs.models.loading import load, load_weights
from rayjobs.models.options import LoadOptions, ModelConfig, SourceConfig
from serve.config import ServeConfig
from serve.registry import Registry
from tests import headers


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


def test_single_files_tell_the_same_wherever_they_are_asked(tmp_path: Path) -> None:
    v, playground = headers.V | headers.ZERO, {"edm_mean": (1, 4), "edm_std": (1, 4)}
    for shapes, family, side, prediction in (
        (headers.XL | v, "sdxl", 1024, Prediction("v_prediction", zero_snr=True)),
        (headers.XL | playground, "sdxl", 1024, Prediction(is_edm=True)),
        (headers.SD1, "sd", 512, Prediction()),
        (headers.SD2, "sd", 768, Prediction("v_prediction")),
    ):
        uri = headers.write(tmp_path / "model.safetensors", shapes)
        facts, weights = read_facts(uri), find_weights(ModelConfig(uri=uri))
        assert facts.family == weights.family == family
        assert facts.side == weights.default_side == side
        assert facts.prediction == weights.prediction == prediction
        assert facts.guidance_scale == weights.usual.guidance_scale


def test_a_served_model_is_loaded_as_its_keys_say(tmp_path: Path) -> None:
    """Its base, configuration and prediction too, and those of adapters that are for it."""
    keys = {"config": "a/b", "base": "c/d", "revision": "v1", "prediction_type": "v_prediction"}
    config = ServeConfig.model_validate(
        {
            "models": [{"name": "mine", "uri": "owner/mine", **keys}],
            "loras": [{"name": "dog", "uri": "dog", "base": "mine"}],
        }
    )
    for entry in Registry(config).entries():
        assert entry.weights is not None
        assert entry.weights.source == SourceConfig(uri="owner/mine", **keys)


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


def test_a_model_of_the_hub_that_may_change_is_told_how_to_stay(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    copy = tmp_path / "models--owner--name" / "snapshots" / commit
    copy.parent.mkdir(parents=True)
    copy.symlink_to(folders["sdxl"])
    config, weights = SourceConfig(uri="owner/name"), find_weights(str(copy))
    (warning,) = unpinned(config, weights)
    assert f"model.revision={commit}" in warning
    assert not unpinned(config.model_copy(update={"revision": commit}), weights)
    assert not unpinned(SourceConfig(uri=str(copy.resolve())), find_weights(str(copy.resolve())))
