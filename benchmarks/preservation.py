"""What each way of prior preservation keeps of the class: images, teacher, none.

Trains the demo's subject three times from the same seed and compares the model before and after:
400 class prompts without the identifier, with paired seeds, read by the starter model's checker;
preservation (PRES, lower is better) and diversity (DIV, higher is better) of the class; and the
subject itself. `python -m benchmarks.preservation` prints a table and writes preservation.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rayjobs.config import load_config
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Request
from rayjobs.dreambooth import composition, metrics
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.starter import checker, subject, world

CONFIG = "configs/demo/dreambooth.yaml"
MODES = ("images", "teacher", "none")
GROUNDS = ("green", "purple", "orange", "pink", "cyan", "red")
"""On which the subject was not photographed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", help="of the demo's keys, as in train.steps=500")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--pairs", type=int, default=400, help="class pictures before and after")
    parser.add_argument("--subjects", type=int, default=50, help="pictures of the subject")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = {"before": look("starter", args.pairs, args.subjects)}
        for mode in args.modes:
            rows[mode] = look(train(mode, folder, args.overrides), args.pairs, args.subjects)
    print(f"{'prior':10}" + "".join(f"{name:>20}" for name in rows["before"]))
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{value:20.3f}" for value in row.values()))
    found = {"settings": vars(args), "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


def train(mode: str, folder: str, changes: list[str]) -> str:
    """Train with one kind of prior preservation; return the exported model's folder."""
    overrides = [f"output.uri={folder}/{mode}", f"prior.mode={mode}", f"run.name={mode}"]
    overrides += [f"prior.uri={folder}/prior", "validation.every_n_steps=0"]
    config = load_config(DreamBoothConfig, CONFIG, overrides + changes)
    return composition.train(config).export_uri


def look(uri: str, pairs: int, subjects: int) -> dict[str, float]:
    """What a model makes of the class and of the subject."""
    engine = Engine(load_model(uri), max_rows=16)
    prompts = class_prompts(pairs)
    of_class = draw(engine, prompts)
    matched = [checker.matches(p, text) for p, text in zip(of_class, prompts, strict=True)]
    stars = draw(engine, ["a photo of a star"] * 64)
    asked = [f"a photo of a sks star on a {GROUNDS[i % 6]} background" for i in range(subjects)]
    shown = [subject.shows(picture) for picture in draw(engine, asked)]
    config = load_config(DreamBoothConfig, CONFIG)
    real = [photo.open() for photo in find_photos(config.instance.uri, "")]
    pictures = {"a photo of a star": [Image.fromarray(p) for p in stars]}
    found = metrics.measure(metrics.Starter(), None, real, pictures, pictures)
    return {
        "class adherence %": 100 * float(np.mean(matched)),
        "PRES": found["preservation"],
        "DIV": found["diversity"],
        "subject %": 100 * float(np.mean(shown)),
    }


def class_prompts(count: int) -> list[str]:
    """Prompts of the plain grammar, half of them of the subject's class, in a fixed order."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        colour, ground = rng.choice(list(world.COLOURS), size=2, replace=False)
        shape = subject.SHAPE if number % 2 == 0 else str(rng.choice(world.SHAPES))
        found.append(f"a photo of a {colour} {shape} on a {ground} background")
    return found


def draw(engine: Engine, prompts: list[str]) -> list[np.ndarray]:
    """One picture of each prompt, the n-th with seed n."""
    requests = [Request(prompt=text, seed=n, steps=12) for n, text in enumerate(prompts)]
    done: list[Any] = sorted(engine.generate(requests), key=lambda result: result.request.seed)
    return [np.asarray(result.image) for result in done]


if __name__ == "__main__":
    main()
