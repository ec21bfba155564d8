"""The loader: overrides, and mistakes told by name."""

from pathlib import Path

import pytest
import yaml

from rayjobs import keys
from rayjobs.config import BadInput, load_config
from rayjobs.generation.config import GenerateConfig

CONFIGS = Path(__file__).parents[1] / "configs"
JOB = """
model: {uri: starter}
prompts: {inline: [a red star]}
output: {uri: somewhere}
"""


def load(tmp_path: Path, *overrides: str, text: str = JOB) -> GenerateConfig:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_config(GenerateConfig, str(path), list(overrides))


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    config = load(tmp_path, "sampler.steps=40", "seeds.count=3", "prompts.inline=[x, y]")
    assert config.sampler.steps == 40
    assert config.seeds.count == 3
    assert config.prompts.inline == ("x", "y")


WORDS = ("no", "On", "12:30", "010", "null", "~", "1e3", "1.50", "2024-01-01", "0x1F", "true", ".5")


def test_text_is_what_is_written(tmp_path: Path) -> None:
    """YAML takes each of these words for something else."""
    listed = ", ".join(WORDS)
    axes = f"axes: {{no: [{listed}], b: [a]}}"
    text = f"prompts: {{inline: [{listed}], templates: ['{{no}}{{b}}{{prompt}}'], {axes}}}"
    text = JOB.replace("prompts: {inline: [a red star]}", text)
    file = load(tmp_path, text=text + "sampler: {negative_prompt: 010}")
    assert file.prompts.inline == file.prompts.axes["no"] == WORDS
    assert file.sampler.negative_prompt == "010"
    ends = [f"prompts.axes.no=[{listed}]", "model.compile=no", "model.uri=12:30"]
    line = load(tmp_path, "prompts.inline=no", *ends, text=text)
    assert (line.prompts.inline, line.prompts.axes["no"]) == (("no",), WORDS)
    assert (line.model.compile, line.model.uri) == ("no", "12:30")


@pytest.mark.parametrize(
    "prompt",
    [
        *("a star #1 of ten", "# first", "a cat: sitting", "- a dog", "{red|blue}", "{a} #b"),
        *("[cat:dog:0.5] photo", "*stars*", "&c", "!bang", "| pipe", "'a' and 'b'", "50%", "---"),
    ],
)
def test_an_override_is_not_cut(tmp_path: Path, prompt: str) -> None:
    config = load(tmp_path, f"sampler.negative_prompt={prompt}", f"output.uri=/data/{prompt}")
    assert (config.sampler.negative_prompt, config.output.uri) == (prompt, f"/data/{prompt}")
    assert load(tmp_path, f"prompts.inline={prompt}").prompts.inline == (prompt,)
    quoted = prompt.replace("'", "''")
    assert load(tmp_path, f"prompts.inline=['{quoted}', b #2]").prompts.inline == (prompt, "b #2")
    text = JOB.replace("a red star", f"'{quoted}'")
    assert load(tmp_path, text=text).prompts.inline == (prompt,)


def test_numbers_are_those_of_the_key(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        *("seeds.start=010", "output.most_images=2_000_000", "sampler.guidance_scale=1e0"),
        *("sampler.options={eta: 1e-1, use_karras_sigmas: no}", "model.vae_tiling=yes"),
    )
    assert (config.seeds.start, config.output.most_images) == (10, 2_000_000)
    assert config.sampler.options == {"eta": 0.1, "use_karras_sigmas": False}
    assert (config.sampler.guidance_scale, config.model.vae_tiling) == (1.0, True)
    with pytest.raises(BadInput, match=r"seeds.start is '12:30': Input should be a valid integer"):
        load(tmp_path, "seeds.start=12:30")


def test_null_clears_what_the_file_sets(tmp_path: Path) -> None:
    text = JOB + "image: {width: 64}\nsampler: {negative_prompt: bad}\nquality:\n"
    nulls = ("image=null", "prompts.inline=null", "prompts.uri=p.txt", "sampler.steps=~")
    config = load(tmp_path, *nulls, "sampler.negative_prompt=", text=text)
    assert (config.image.width, config.prompts.inline, config.sampler.steps) == (None, (), None)
    assert config.sampler.negative_prompt is None
    assert load(tmp_path, "seeds=", "seeds.count=3").seeds.count == 3
    with pytest.raises(BadInput, match=r"model.uri: required, but not given"):
        load(tmp_path, "model.uri=null")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sampler.stepz=4", "sampler.stepz: unknown key; did you mean 'steps'?"),
        ("samplers.steps=4", "samplers: unknown key; did you mean 'sampler'?"),
        ("sampler.steps=many", "sampler.steps is 'many'"),
        ("sampler.steps=0", "sampler.steps is 0"),
        (
            "sampler.guidance_interval=[1, 0]",
            "sampler: guidance_interval is [1.0, 0.0]; it must be",
        ),
        ("sampler.cache_interval=0", "sampler.cache_interval is 0"),
        ("sampler={steps: 3, timesteps: [9, 3]}", "steps is 3, but timesteps are of 2; leave ste"),
        ("sampler.timesteps=[9, 9]", "timesteps has 9 after 9"),
        ("model.loras=x", "model.loras is 'x': Input should be a list"),
        ("sampler.guidance_scale=.nan", "sampler.guidance_scale is nan"),
        ("image.width=65", "image.width is 65; it must be a multiple of 8, such as 64"),
        ("workers.max=1 ", "workers.max is 1, below workers.min, 2"),
        ("seeds.count=0", "seeds.count is 0"),
        ("prompts.uri=a.txt", "give prompts.inline or prompts.uri, not both"),
        ("prompts.inline=[]", "no prompts"),
        ("steps", "'steps' is not of the form key=value"),
        ("model.uri.x=1", "uri is a value, it has no keys"),
    ],
)
def test_mistakes_are_told_by_name(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, "workers.min=2", override)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seeds: {count: 1, count: 2}", "line 5: the key 'count' is there twice, first in line 5"),
        ("model: {uri: other}", "line 5: the key 'model' is there twice, first in line 2"),
        ("sampler:\n  steps: 4\n  steps: 5", "line 7: the key 'steps' is there twice"),
    ],
)
def test_a_key_is_given_once(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, text=JOB + text)
    assert told in str(caught.value)
    assert "job.yaml" in str(caught.value)


def test_merged_keys_may_be_replaced(tmp_path: Path) -> None:
    text = JOB + "sampler: {<<: {steps: 3, name: ddim}, steps: 4}"
    config = load(tmp_path, text=text)
    assert (config.sampler.steps, config.sampler.name) == (4, "ddim")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("seeds.count=2", "sampler.steps=4", "seeds.count=3"), "override seeds.count is given"),
        (("seeds.count=2", "seeds={start: 3}"), "override seeds would undo seeds.count"),
        (("seeds={count: 3, count: 4}",), "the key 'count' is there twice"),
    ],
)
def test_an_override_is_given_once(tmp_path: Path, overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        load(tmp_path, *overrides)


def test_one_prompt_needs_no_list(tmp_path: Path) -> None:
    assert load(tmp_path, "prompts.inline=a ring").prompts.inline == ("a ring",)


def test_what_is_required_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"output: required, but not given"):
        load(tmp_path, text="model: {uri: starter}\nprompts: {inline: [x]}")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        load_config(GenerateConfig, str(tmp_path / "none.yaml"))
    with pytest.raises(BadInput, match="not valid YAML"):
        load(tmp_path, text="a: [")
    with pytest.raises(BadInput, match="expected keys and values"):
        load(tmp_path, text="- a")


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    model = keys.model_of(path.stem)
    if path.stem != "serve":
        load_config(model, str(path))
        return
    for application in yaml.safe_load(path.read_text("utf-8"))["applications"]:
        model.model_validate(application["args"])
