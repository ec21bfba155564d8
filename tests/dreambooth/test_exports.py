"""Every sort of export, loaded back by plain diffusers and by our engine: the same picture."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rayjobs.config import BadInput
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.dreambooth import export
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training import layouts, worker
from rayjobs.dreambooth.training.tuned_model import TunedModel
from rayjobs.models import exports, loading
from rayjobs.models.exports import FUSED, KOHYA_FILE, PEFT_FOLDER
from rayjobs.models.options import LoadOptions, LoraConfig, ModelConfig
from tests.dreambooth.fitting import differ, opened, resolved, settings

pytestmark = pytest.mark.model

WORD = "<sks>"
PROMPT = f"a photo of a {WORD} star"
INVERSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "words": {"num_vectors": 2, "token": WORD, "initial": "star"},
    "alone": {"num_vectors": 2, "token": WORD, "initial": "star", "alone": True},
}
MATRIX = [
    pytest.param(family, method, words, marks=[pytest.mark.slow] if slow else [])
    for family, method, words in product(("sdxl", "sd"), ("lora", "full"), INVERSIONS)
    for slow in [(family, words) not in {("sdxl", "words"), ("sd", "words"), ("sdxl", "none")}]
]


def tuned(
    base: Path, photos: Path, method: str, words: str, lora: dict[str, Any] | None = None
) -> tuple[DreamBoothConfig, TunedModel]:
    """A model as a training might leave it: everything that trains is off by a little."""
    config = settings(base, photos, "none", method=method, text_encoders=words != "none")
    if lora is not None:
        adapter = config.lora.model_validate({"rank": 4, "alpha": 2.0, **lora})
        config = config.model_copy(update={"lora": adapter})
    inverted = config.inversion.model_validate(INVERSIONS[words])
    prompted = config.instance.model_copy(update={"prompt": PROMPT})
    config = config.model_copy(update={"inversion": inverted, "instance": prompted})
    made = TunedModel(worker.load(config, "cpu", torch.float32), config, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return config, made.eval()


def draw(pipeline: Any) -> torch.Tensor:
    """A picture by diffusers, (3, H, W) in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(1)
    size: dict[str, Any] = {"height": 64, "width": 64, "output_type": "pt"}
    made = pipeline(PROMPT, num_inference_steps=3, guidance_scale=4.0, generator=generator, **size)
    return made.images[0]


def draw_ours(model: Model, loras: tuple[LoraConfig, ...] = ()) -> torch.Tensor:
    request = Request(
        prompt=PROMPT,
        seed=1,
        steps=3,
        guidance_scale=4.0,
        width=64,
        height=64,
        loras=tuple(Lora(path=lora.uri) for lora in loras),
    )
    (result,) = Engine(model).generate([request], keep_pixels=True)
    assert result.pixels is not None, result.error
    return result.pixels


def draw_uri(uri: Path) -> torch.Tensor:
    """By our engine, as `generate model.uri=...` would."""
    config = exports.resolve(ModelConfig(uri=str(uri)))
    return draw_ours(loading.load(config), config.loras)


def with_words(pipeline: Any, export: Path) -> Any:
    """diffusers' pipeline of the base model, taught the export's word."""
    held = load_file(export / exports.EMBEDDINGS_FILE)
    pairs = [("clip_l", "text_encoder", "tokenizer"), ("clip_g", "text_encoder_2", "tokenizer_2")]
    for name, encoder, tokenizer in pairs if "clip_l" in held else [(WORD, *pairs[0][1:])]:
        parts = getattr(pipeline, encoder), getattr(pipeline, tokenizer)
        pipeline.load_textual_inversion(
            {WORD: held[name]}, token=WORD, text_encoder=parts[0], tokenizer=parts[1]
        )
    return pipeline


@pytest.mark.parametrize(("family", "method", "words"), MATRIX)
def test_every_export_is_loaded_back(
    folders: dict[str, Path], photos: Path, family: str, method: str, words: str, tmp_path: Path
) -> None:
    base = folders[family]
    config, model = tuned(base, photos, method, words)
    trained = draw(export.pipeline(model.model))
    assert differ(trained, draw(opened(base))) > 1e-3
    export.save(config, model, tmp_path)
    exports.write(str(tmp_path), export.describe(resolved(config), model.model, 1, {}))
    for path in tmp_path.rglob("*.json"):
        assert path.name == exports.FILE or str(base) not in path.read_text(), "of this machine"
    kind = config.export_kind
    assert differ(draw_uri(tmp_path), trained) <= 1e-4
    if kind == "full":
        assert differ(draw(opened(tmp_path)), trained) <= 1e-4
    else:
        assert differ(draw(opened(tmp_path / FUSED)), trained) <= 1e-4
        assert differ(draw_uri(tmp_path / FUSED), trained) <= 1e-4
        pipeline = opened(base) if words == "none" else with_words(opened(base), tmp_path)
        if kind == "lora":
            pipeline.load_lora_weights(tmp_path, weight_name=exports.LORA_FILE)
        assert differ(draw(pipeline), trained) <= 1e-4
    assert (tmp_path / KOHYA_FILE).exists() == (kind == "lora")
    if kind == "lora":
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(tmp_path, weight_name=KOHYA_FILE)
        assert differ(draw(pipeline), trained) <= 1e-4
        taught = exports.resolve(ModelConfig(uri=str(tmp_path))).model_copy(update={"loras": ()})
        kohya = LoraConfig(uri=str(tmp_path / KOHYA_FILE))
        assert differ(draw_ours(loading.load(taught), (kohya,)), trained) <= 1e-4


KINDS: list[dict[str, Any]] = [
    {"kind": "dora", "targets": "convolution", "conv_rank": 2},
    {"kind": "lokr", "targets": "convolution", "conv_rank": 1},
    {"kind": "loha", "targets": "convolution"},
    {"kind": "lokr", "factor": 4, "rank": 64, "alpha": 96.0},
    {"kind": "lora", "targets": "convolution", "conv_rank": 1},
]


@pytest.mark.parametrize(
    "adapter",
    [pytest.param(k, marks=[pytest.mark.slow] if n > 1 else []) for n, k in enumerate(KINDS)],
    ids=lambda adapter: "-".join(map(str, adapter.values())),
)
def test_every_kind_of_adapter_in_every_layout(
    folders: dict[str, Path], photos: Path, adapter: dict[str, Any], tmp_path: Path
) -> None:
    """Trained, fused, and in diffusers', kohya's and peft's layouts: the same picture."""
    base = folders["sdxl"]
    config, model = tuned(base, photos, "lora", "none", lora=adapter)
    trained = draw(export.pipeline(model.model))
    assert differ(trained, draw(opened(base))) > 1e-3
    export.save(config, model, tmp_path)
    exports.write(str(tmp_path), export.describe(resolved(config), model.model, 1, {}))
    assert differ(draw_uri(tmp_path), trained) <= 1e-4
    assert differ(draw(opened(tmp_path / FUSED)), trained) <= 1e-4
    plain = loading.load(ModelConfig(uri=str(base)))
    for path in (tmp_path / KOHYA_FILE, tmp_path / PEFT_FOLDER / "unet"):
        assert differ(draw_ours(plain, (LoraConfig(uri=str(path)),)), trained) <= 1e-4
    wrapped = opened(base)
    wrapped.unet = PeftModel.from_pretrained(wrapped.unet, tmp_path / PEFT_FOLDER / "unet")
    assert differ(draw(wrapped), trained) <= 1e-4
    if adapter["kind"] in ("lora", "dora"):
        pipeline = opened(base)
        pipeline.load_lora_weights(tmp_path, weight_name=exports.LORA_FILE)
        assert differ(draw(pipeline), trained) <= 1e-4


def test_an_adapter_has_the_same_bytes_each_time(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Nothing in it is in the order of a set or of a hash table."""
    _, model = tuned(folders["sdxl"], photos, "lora", "none")
    written = set()
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        layouts.save_main(model, tmp_path / str(number) / exports.LORA_FILE)
        written.add((tmp_path / str(number) / exports.LORA_FILE).read_bytes())
    (data,) = written
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header["__metadata__"]
    assert list(metadata) == sorted(metadata)
    targets = json.loads(metadata["lora_adapter_metadata"])["unet.target_modules"]
    assert len(targets) > 4
    assert targets == sorted(targets)


def test_a_pipeline_that_diffusers_taught_and_saved(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A word of several vectors means all of them in a model's folder of whatever origin."""
    config, model = tuned(folders["sd"], photos, "lora", "alone")
    export.save(config, model, tmp_path)
    pipeline = with_words(opened(folders["sd"]), tmp_path)
    pipeline.save_pretrained(tmp_path / "saved")
    assert differ(draw_uri(tmp_path / "saved"), draw(pipeline)) <= 1e-4


def test_a_word_on_top_of_an_export_that_has_one(
    folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """A second run on a whole export, whose own word stays."""
    config, first = tuned(folders["sd"], photos, "full", "words")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    export.save(config, first, tmp_path / "first")
    known = draw(opened(tmp_path / "first"))
    second = config.model_copy(
        update={"inversion": config.inversion.model_copy(update={"token": "<two>"})}
    )
    options = LoadOptions(channels_last=False)
    model = loading.load_weights(str(tmp_path / "first"), options, onednn=False)
    again = TunedModel(model, second, torch.float32).eval()
    export.save(second, again, tmp_path / "second")
    assert differ(draw(opened(tmp_path / "second")), known) <= 1e-4
    assert differ(draw_uri(tmp_path / "second"), known) <= 1e-4


def test_an_export_of_an_older_version_is_refused(tmp_path: Path) -> None:
    note = exports.ExportNote(
        kind="full",
        base_uri="starter",
        base_sha256="",
        family="sdxl",
        instance_prompt=PROMPT,
        identifier=WORD,
        step=1,
        seed=0,
        files={},
        photos={},
        tokens=(WORD,),
    )
    exports.write(str(tmp_path), note)
    with pytest.raises(BadInput, match=r"older version.* remove \S+manifest\.json and start"):
        exports.resolve(ModelConfig(uri=str(tmp_path)))
