"""PNGs with the web UI's text as prompts: each setting is played back, refused or told."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rayjobs.config import BadInput
from rayjobs.generation.config import PromptsConfig
from rayjobs.generation.prompts.snapshot import Snapshot, write_snapshot

FACTS = "Steps: 25, Sampler: Euler a, CFG scale: 6.5, Seed: 42, Size: 512x768"


def save(folder: Path, name: str, text: str | None) -> None:
    info = PngInfo()
    if text is not None:
        info.add_text("parameters", text)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def played(folder: Path, family: str | None = "sd", **config: Any) -> list[dict[str, Any]]:
    path = str(folder.parent / "snapshot.parquet")
    write_snapshot(PromptsConfig(uri=str(folder), **config), path, family)
    found = Snapshot(path)
    return [found.row(number) for number in range(len(found))]


def one(tmp_path: Path, text: str | None, family: str = "sd") -> dict[str, Any]:
    save(tmp_path / "in", "a.png", text)
    (row,) = played(tmp_path / "in", family)
    return row


def test_a_picture_of_the_web_ui(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "a (red:1.2) star,\nof (( gold )) \\(fine\\)\nNegative prompt: [blur], worst\nquality\n"
        f"{FACTS}, Model hash: 6ce0161689, Model: v1-5-pruned, Clip skip: 2, "
        'Civitai resources: [{"type":"lora","weight":0.8,"modelVersionId":1}], '
        'TI hashes: "easy: 1a, other: 2b", Schedule type: Automatic, Version: v1.9.4'
    )
    assert one(tmp_path, text) == {
        "prompt": "a (red:1.2) star,\nof (( gold )) \\(fine\\)",
        "negative_prompt": "[blur], worst\nquality",
        "prompt_syntax": "a1111",
        "seed": 42,
        "width": 512,
        "height": 768,
        "sampler": "euler_a",
        "steps": 25,
        "guidance_scale": 6.5,
        "guidance_rescale": None,
        "clip_skip": 1,
        "picture": "a.png",
    }
    told = capsys.readouterr().err
    assert "pictures of another program" in told
    assert "1 will be alike, not equal" in told
    for left in ("Model (v1-5-pruned)", "TI hashes (easy: 1a, other: 2b)", "Civitai resources ("):
        assert left in told
    assert "Steps" not in told
    # SDXL's layer stays there whatever is named.
    assert one(tmp_path, text, "sdxl")["clip_skip"] is None
    assert "Clip skip (2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "sampler"),
    [
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmpp_2m_karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m_karras"),
        ("Sampler: DPM++ 2M", "dpmpp_2m"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "dpmpp_2m"),
        ("Sampler: DPM++ SDE Karras", "dpmpp_sde_karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Karras", "dpmpp_2m_sde_karras"),
        ("Sampler: Euler, Schedule type: Automatic", "euler"),
        ("Sampler: DDIM", "ddim"),
        ("Sampler: PLMS", "pndm"),
        ("Sampler: LCM", "lcm"),
        ("Sampler: deis, Version: rayjobs", "deis"),
        ("Sampler: DPM++ 2S a Karras", None),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", None),
        ("Sampler: Euler, Schedule type: SGM Uniform", None),
        ("Sampler: Restart", None),
        ("Sampler: DPM2 Karras", None),
        ("Sampler: deis, Schedule type: Karras", None),
    ],
)
def test_samplers_and_schedules(tmp_path: Path, facts: str, sampler: str | None) -> None:
    text = f"a star\nSteps: 9, {facts}, CFG scale: 7, Seed: 1, Size: 64x64"
    if sampler is not None:
        assert one(tmp_path, text)["sampler"] == sampler
        return
    with pytest.raises(BadInput, match=r"was made with the sampler .* which is none of ddim"):
        one(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "has no generation parameters"),
        ("a star", "has no generation parameters"),
        (f"a star\n{FACTS}, Hires upscale: 2, Hires steps: 10", "made with Hires upscale (2), wh"),
        (f"a star\n{FACTS}, Denoising strength: 0.4", "made with Denoising strength (0.4)"),
        (f'a star\n{FACTS}, ControlNet 0: "preprocessor: canny"', "ControlNet 0 (preprocessor: c"),
        (f"a star\n{FACTS}, ADetailer model: face.pt", "made with ADetailer model"),
        (f"a star\n{FACTS}, Variation seed: 3, Variation seed strength: 0.2", "Variation seed (3)"),
        (f"a star\n{FACTS}, Refiner: sdxl_refiner", "made with Refiner (sdxl_refiner)"),
        (f'a star\n{FACTS}, Lora hashes: "x: 1a"', "made with Lora hashes (x: 1a)"),
        (f"a star <lora:x:0.8>\n{FACTS}", "picture a.png: prompt has '<lora:x:0.8>'"),
        (f"a ([red:blue:0.5] star\n{FACTS}", "picture a.png: prompt has [a:b:0.5] or [a|b] beside"),
        (f"a star\nNegative prompt: ([a|b]\n{FACTS}", "negative_prompt has [a:b:0.5] or [a|b] be"),
        (f"a star\n{FACTS}, Emphasis: Ignore", "has Emphasis 'Ignore', which is neither"),
        (f"a star\n{FACTS}, Tiling: True", "made with Tiling (True)"),
        (f"a star\n{FACTS}, Eta: 0.5", "made with Eta (0.5)"),
        (f"a star\n{FACTS}, Cache interval: 3", "made with Cache interval (3)"),
        ("a star\nSteps: 9, Seed: 1, Size: 70x64", "width is 70; it must be a multiple of 8"),
        ("a star\nSteps: many, Seed: 1, Size: 64x64", "has Steps 'many', which is not a number"),
        ("a star\nSteps: 9, Seed: -1, Size: 64x64", "seed has -1, but a seed is in 0"),
        (f"Negative prompt: worst\n{FACTS}", "picture a.png: has no prompt, but"),
    ],
)
def test_what_cannot_be_played_back_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    with pytest.raises(BadInput) as caught:
        one(tmp_path, text)
    assert told in str(caught.value)
    assert "a.png" in str(caught.value)


def test_syntaxes_and_files_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save(folder, "b/no-norm.png", f"a (star)\n{FACTS}, Emphasis: No norm, Version: v1.10.1")
    save(folder, "a.PNG", f"a (star)\n{FACTS}, Version: rayjobs")
    save(folder, "c.png", f"a (star)\n{FACTS}, Prompt syntax: a1111, Version: rayjobs")
    save(folder, ".hidden.png", None)
    (folder / "c.txt").write_text("what the web UI writes beside it")
    found = {row["picture"]: row["prompt_syntax"] for row in played(folder, syntax="a1111")}
    assert found == {"a.PNG": "plain", "b/no-norm.png": "a1111-no-norm", "c.png": "a1111"}
    (folder / "d.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match=r"holds PNGs and d.jpg; only PNGs' parameters are read"):
        played(folder)
    (folder / "d.jpg").rename(folder / "d.png")
    with pytest.raises(BadInput, match=r"d.png cannot be read as PNG"):
        played(folder)


def test_prompts_in_a_file_have_a_syntax_too(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a <lora:b:1>"}\n{"prompt": "a (b)", "prompt_syntax": "a1111"}\n')
    snapshot = str(tmp_path / "snapshot.parquet")
    assert write_snapshot(PromptsConfig(uri=str(path)), snapshot) == 2
    with pytest.raises(BadInput, match=r"line 1: prompt has '<lora:b:1>'"):
        write_snapshot(PromptsConfig(uri=str(path), syntax="a1111"), snapshot)
    path.write_text('{"prompt": "a", "prompt_syntax": "compel"}\n')
    with pytest.raises(BadInput, match=r"line 1: prompt_syntax is 'compel'; it must be one of"):
        write_snapshot(PromptsConfig(uri=str(path)), snapshot)


@pytest.mark.parametrize(
    "texts",
    [
        {"inline": ["a <lora:b:0.5>"]},
        {"templates": ["<lora:{x}:1>"], "axes": {"x": ["a"]}},
        {"templates": ["a {x}"], "axes": {"x": ["<lora:a:1>"]}},
    ],
)
def test_a_job_s_own_texts_are_checked_before_it_starts(texts: dict[str, Any]) -> None:
    PromptsConfig.model_validate(texts)
    with pytest.raises(ValueError, match="has '"):
        PromptsConfig.model_validate(texts | {"syntax": "a1111"})
