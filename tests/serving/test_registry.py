"""Models and adapters by name: listed, found, added while running, shared by rows."""

import asyncio
import io
import json
import shutil
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.diffusion.text.inversion import initial_vectors, to_tensors
from rayjobs.models import exports
from rayjobs.models.exports import ExportNote
from serve.config import ServeConfig
from serve.engine.loop import EngineLoop
from serve.images import to_image
from serve.protocol import Event, Failed, Finished, ImagesRequest
from serve.registry import Registry
from tests.nodes import wait_for
from tests.serving.calls import ask_all
from tests.serving.running import get

REFRESHED_S = 60.0

pytestmark = pytest.mark.model

STARTER = {"name": "starter", "uri": "starter"}
LAYERS = [f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qv"]


def export(folder: Path, model: Model, seed: int = 0, **facts: Any) -> Path:
    """A run's export: an adapter for the starter model that visibly acts."""
    place = folder / "export"
    place.mkdir(parents=True)
    torch.manual_seed(seed)
    factors = {}
    for layer in LAYERS:
        width = model.unet.get_submodule(layer.removeprefix("unet.")).in_features
        factors[f"{layer}.lora_A.weight"] = torch.randn(4, width)
        factors[f"{layer}.lora_B.weight"] = torch.randn(width, 4) * 0.5
    save_file(factors, place / exports.LORA_FILE)
    note = {
        "kind": "lora",
        "base_uri": "starter",
        "base_sha256": model.sha256,
        "family": "sdxl",
        "instance_prompt": "a photo of a sks star",
        "identifier": "sks",
        "step": 1,
        "seed": seed,
        "files": {},
        "photos": {},
    }
    exports.write(str(place), ExportNote(**{**note, **facts}))
    return place


def config(folder: Path | str, **more: Any) -> ServeConfig:
    keys = {"models": [STARTER], "registry": {"uri": str(folder), "refresh_s": 0.1}}
    # Each step computes all places of a replica, the empty ones too.
    keys["engine"] = {"max_rows": 4} | more.pop("engine", {})
    return ServeConfig.model_validate(keys | more)


def test_exports_are_found_by_their_folder_s_name(tmp_path: Path, starter: Model) -> None:
    registry = Registry(config(tmp_path))
    assert registry.find("dog") is None
    export(tmp_path / "dog", starter)
    time.sleep(0.2)
    found = registry.find("dog")
    assert found is not None
    assert (found.kind, found.base, found.hints) == ("lora", "starter", ("a photo of a sks star",))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "damaged" / "export").mkdir(parents=True)
    (tmp_path / "damaged" / "export" / exports.FILE).write_text("{")
    time.sleep(0.2)
    registry.refresh()
    assert sorted(entry.name for entry in registry.entries()) == ["dog", "starter"]
    assert "damaged" in registry.problems


def test_what_an_ingress_has_seen_is_looked_for_at_once(tmp_path: Path, starter: Model) -> None:
    keys = config(tmp_path).model_dump() | {"registry": {"uri": str(tmp_path), "refresh_s": 60}}
    registry = Registry(ServeConfig.model_validate(keys))
    assert registry.find("dog") is None
    export(tmp_path / "dog", starter)
    assert registry.find("dog") is None  # anyone may ask for any name
    assert registry.find("dog", promised=True) is not None


@pytest.mark.parametrize(
    "name", ["..", "../outside", "/etc", "a/b", "dog/../../x", "", "a\0b", "."]
)
def test_a_name_cannot_leave_the_folder(tmp_path: Path, starter: Model, name: str) -> None:
    export(tmp_path / "outside", starter)
    (tmp_path / "inside").mkdir()
    assert Registry(config(tmp_path / "inside")).find(name) is None


def test_an_adapter_whose_base_is_not_here(tmp_path: Path, starter: Model) -> None:
    export(tmp_path / "dog", starter, base_uri="/absent/model")
    registry = Registry(config(tmp_path))
    assert registry.find("dog") is None
    assert "/absent/model, which is not here" in registry.problems["dog"]


def test_a_lora_for_no_model(tmp_path: Path, starter: Model) -> None:
    uri = str(export(tmp_path / "dog", starter))
    with pytest.raises(BadInput, match="base 'nobody' is not in models; known are starter"):
        Registry(config(tmp_path, loras=[{"name": "x", "uri": uri, "base": "nobody"}]))


def made_with(
    names: Callable[[EngineLoop], list[ImagesRequest]], keys: ServeConfig
) -> list[list[Event]]:
    async def all_of(loop: EngineLoop, request: ImagesRequest) -> list[Event]:
        return [event async for event in loop.generate(request)]

    async def main() -> list[list[Event]]:
        loop = EngineLoop(keys.engine, Registry(keys))
        try:
            return await asyncio.gather(*(all_of(loop, request) for request in names(loop)))
        finally:
            await loop.close()
            assert loop.failure is None, loop.failure

    return asyncio.run(main())


def make_request(
    model: str, seed: int, *loras: tuple[str, float], prompt: str = "a red star"
) -> ImagesRequest:
    return ImagesRequest(
        id="1", caller="me", model=model, prompt=prompt, seeds=(seed,), steps=5, loras=loras
    )


def pixels(events: list[Event]) -> np.ndarray:
    (finished,) = [event for event in events if isinstance(event, Finished)]
    return np.asarray(to_image(finished.pixels), int)


def test_eight_adapters_at_once_are_as_alone(tmp_path: Path, starter: Model) -> None:
    paths = {f"run-{n}": export(tmp_path / f"run-{n}", starter, seed=n) for n in range(8)}
    requests = [make_request(name, n) for n, name in enumerate(paths)]
    requests.append(make_request("starter", 20, ("run-1", 0.5), ("run-2", -1.25)))
    requests.append(make_request("starter", 21))
    answers = made_with(lambda _: requests, config(tmp_path, engine={"max_rows": 10}))
    plain = Engine(load_model("starter"), max_rows=1)
    for asked, events in zip(requests, answers, strict=True):
        uses = [(asked.model, 1.0)] if asked.model in paths else list(asked.loras)
        loras = tuple(Lora(path=str(paths[name]), scale=scale) for name, scale in uses)
        request = Request(prompt="a red star", seed=asked.seeds[0], steps=5, loras=loras)
        (alone,) = plain.generate([request])
        assert np.abs(pixels(events) - np.asarray(alone.image, int)).max() <= 1
    assert np.abs(pixels(answers[8]) - pixels(answers[9])).mean() > 1


def test_many_adapters_take_turns_in_memory(tmp_path: Path, starter: Model) -> None:
    for number in range(5):
        export(tmp_path / f"run-{number}", starter, seed=number)
    keys = config(tmp_path, engine={"max_loras": 2})
    first = [made_with(lambda _, n=n: [make_request(f"run-{n}", 1)], keys)[0] for n in range(5)]

    async def main() -> list[np.ndarray]:
        loop = EngineLoop(keys.engine, Registry(keys))
        try:
            found = []
            for number in (0, 1, 2, 3, 4, 0, 2):
                events = [event async for event in loop.generate(make_request(f"run-{number}", 1))]
                found.append(pixels(events))
            (loaded,) = loop.models.loaded.values()
            assert len(loaded.adapters) == 2
            return found
        finally:
            await loop.close()

    made = asyncio.run(main())
    for number, picture in zip((0, 1, 2, 3, 4, 0, 2), made, strict=True):
        assert np.abs(picture - pixels(first[number])).max() <= 1


def test_a_learned_word_beside_its_base(tmp_path: Path, starter: Model) -> None:
    place = export(tmp_path / "word", starter, kind="words", tokens=("<sks>",))
    vectors = initial_vectors(starter, "red", 1)
    save_file(to_tensors(starter, "<sks>", vectors), place / exports.EMBEDDINGS_FILE)
    requests = [
        make_request("starter", 1, prompt="a photo of a red star"),
        make_request("word", 1, prompt="a photo of a <sks> star"),
        make_request("starter", 1, prompt="a photo of a <sks> star"),
    ]
    red, learned, unknown = map(pixels, made_with(lambda _: requests, config(tmp_path)))
    assert np.abs(red - learned).mean() < 3
    assert np.abs(red - unknown).mean() > 5


def test_models_leave_memory_for_others(tmp_path: Path, folders: dict[str, Path]) -> None:
    models = [STARTER, {"name": "other", "uri": str(folders["sdxl"])}]
    keys = config(tmp_path, models=models, engine={"model_memory_gb": 0.015})

    async def main() -> None:
        loop = EngineLoop(keys.engine, Registry(keys))
        try:
            for name in ("starter", "other", "starter"):
                events = [event async for event in loop.generate(make_request(name, 1))]
                assert isinstance(events[-1], Finished), events
                assert loop.names() == [name]
        finally:
            await loop.close()

    asyncio.run(main())


def test_an_adapter_for_another_model_is_told(
    tmp_path: Path, folders: dict[str, Path], starter: Model
) -> None:
    uri = str(export(tmp_path / "dog", starter))
    models = [STARTER, {"name": "other", "uri": str(folders["sd"])}]
    keys = config(tmp_path, models=models, loras=[{"name": "any", "uri": uri}])
    ((failed,),) = made_with(lambda _: [make_request("other", 1, ("any", 1.0))], keys)
    assert isinstance(failed, Failed)
    assert failed.kind == "invalid"
    assert "for another model" in failed.message


def listed(app_url: str) -> list[str]:
    return [each["id"] for each in json.loads(get(f"{app_url}/v1/models"))["data"]]


@pytest.mark.ray
def test_an_export_on_s3_is_served_without_a_restart(
    tmp_path: Path, app_url: str, bucket: str, served_runs: str, starter: Model
) -> None:
    body = {"model": "dog", "prompt": "a photo of a sks star", "seed": 3, "size": "64x64"}
    (refused,) = ask_all(app_url, [body])
    assert refused.status == 404
    place = export(tmp_path / "dog", starter)
    for path in place.iterdir():
        storage.put_file(f"{served_runs}/dog/export/{path.name}", path)
    try:
        wait_for(lambda: listed(app_url) == ["starter", "dog"], REFRESHED_S)
        assert json.loads(get(f"{app_url}/v1/models/dog"))["kind"] == "lora"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{app_url}/v1/models/..%2Fdog")
        plain = body | {"model": "starter"}
        stacked = plain | {"loras": [{"name": "dog", "scale": 1.0}]}
        answers = ask_all(app_url, [body, plain, stacked])
        dog, base, same = (answer.pictures()[0] for answer in answers)
        assert np.abs(dog - same).max() <= 1
        assert np.abs(dog - base).mean() > 1
    finally:
        storage.remove_folder(served_runs)
        wait_for(lambda: listed(app_url) == ["starter"], REFRESHED_S)


def test_an_odd_note_hides_itself_only(tmp_path: Path, starter: Model) -> None:
    export(tmp_path / "dog", starter)
    for name, text in {"list": "[]", "null": '{"format": 1, "base_uri": null}'}.items():
        (tmp_path / name / "export").mkdir(parents=True)
        (tmp_path / name / "export" / exports.FILE).write_text(text)
    registry = Registry(config(tmp_path))
    assert registry.find("dog") is not None
    assert {"list", "null"} <= registry.problems.keys()


def test_a_damaged_adapter_harms_nobody_else(tmp_path: Path, starter: Model) -> None:
    place = export(tmp_path / "bad", starter)
    export(tmp_path / "good", starter)
    factors = {
        f"{LAYERS[0]}.lora_A.weight": torch.randn(4, 64),
        f"{LAYERS[0]}.lora_B.weight": torch.randn(64, 3),
    }
    save_file(factors, place / exports.LORA_FILE)
    requests = [
        make_request("bad", 1),
        make_request("good", 1),
        make_request("starter", 1),
        make_request("bad", 2),
    ]
    bad, good, plain, again = made_with(lambda _: requests, config(tmp_path))
    for failed in (*bad, *again):
        assert isinstance(failed, Failed)
        assert failed.kind == "invalid"
    assert np.abs(pixels(good) - pixels(plain)).mean() > 1


def test_an_export_in_another_s_place_is_noticed(tmp_path: Path, starter: Model) -> None:
    keys = config(tmp_path)
    export(tmp_path / "dog", starter, seed=0)

    async def main() -> list[np.ndarray]:
        registry = Registry(keys)
        registry.watch()
        loop = EngineLoop(keys.engine, registry)
        try:
            found = []
            for seed in (0, 0, 1):
                if seed:
                    shutil.rmtree(tmp_path / "dog")
                    export(tmp_path / "dog", starter, seed=seed)
                    await asyncio.sleep(0.5)
                events = [event async for event in loop.generate(make_request("dog", 7))]
                found.append(pixels(events))
            shutil.rmtree(tmp_path / "dog")
            await asyncio.sleep(0.5)
            (gone,) = [event async for event in loop.generate(make_request("dog", 7))]
            assert isinstance(gone, Failed)
            return found
        finally:
            await loop.close()

    first, same, other = asyncio.run(main())
    assert np.array_equal(first, same)
    assert np.abs(first - other).mean() > 1


def test_an_export_of_an_earlier_version() -> None:
    """Its pictures are those that `generate` made with it at that time."""
    written = Path(__file__).parents[1] / "fixtures" / "before_rooms"
    asked = ImagesRequest(
        id="1",
        caller="me",
        model="sks",
        prompt="a photo of a sks star on a pink background",
        seeds=(5, 6, 7),
        steps=8,
        sampler="euler_a",
        guidance_scale=4.0,
    )
    (events,) = made_with(lambda _: [asked], config(written / "runs"))
    made = {event.seed: event.pixels for event in events if isinstance(event, Finished)}
    rows = pq.read_table(written / "tuned" / "data").to_pylist()
    old = {row["seed"]: row["image"]["bytes"] for row in rows if row["prompt"] == asked.prompt}
    assert sorted(made) == sorted(old) == [5, 6, 7]
    for seed in asked.seeds:
        picture = np.asarray(Image.open(io.BytesIO(old[seed])), int)
        assert np.abs(np.asarray(to_image(made[seed]), int) - picture).max() <= 1
