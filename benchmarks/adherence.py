"""Does the starter model draw what a prompt says? Judged from pixels by `rayjobs.starter.checker`.

`python -m benchmarks.adherence [--model starter]` makes one picture for each of 200 random prompts
of the plain grammar and of 100 with the pairs left out of training (seeds 0, 1, 2, ..., Euler, 20
steps, guidance 4), prints the shares that are right and writes benchmarks/adherence.json and .png.
Then 200 pictures of colours alone, each of which is to follow the outline of a figure that the
prompt does not name, by the starter's ControlNet; and the same without it.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import load_model
from rayjobs.diffusion.request import Control, Request, Result
from rayjobs.starter import checker, world


def random_scenes(number: int) -> list[world.Scene]:
    """Scenes of the plain grammar without the left-out pairs."""
    rng = np.random.default_rng(123)
    scenes: list[world.Scene] = []
    while len(scenes) < number:
        colour, ground = (str(c) for c in rng.choice(list(world.COLOURS), 2, replace=False))
        scene = world.Scene(colour, str(rng.choice(world.SHAPES)), ground)
        if (scene.colour, scene.shape) not in world.LEFT_OUT:
            scenes.append(scene)
    return scenes


def left_out_scenes(number: int) -> list[world.Scene]:
    """Scenes of the pairs that were never drawn, by turns, on every other colour."""
    pairs = sorted(world.LEFT_OUT)
    scenes = []
    for n in range(number):
        colour, shape = pairs[n % len(pairs)]
        grounds = [ground for ground in world.COLOURS if ground != colour]
        scenes.append(world.Scene(colour, shape, grounds[n // len(pairs) % len(grounds)]))
    return scenes


def draw(engine: Engine, scenes: list[world.Scene]) -> list[np.ndarray]:
    """One picture for each scene, seeds 0, 1, 2, ..."""
    requests = [
        Request(prompt=world.caption(scene), seed=n, sampler="euler", steps=20, guidance_scale=4.0)
        for n, scene in enumerate(scenes)
    ]
    results: list[Result] = sorted(engine.generate(requests), key=lambda r: r.request.seed)
    return [np.asarray(result.image) for result in results]


def judge(scenes: list[world.Scene], pictures: list[np.ndarray]) -> dict[str, float]:
    """Shares of pictures with both colours right, with the shape right, and with all right."""
    readings = [checker.read(picture) for picture in pictures]
    colours = [
        r.colour == s.colour and r.ground == s.ground for s, r in zip(scenes, readings, strict=True)
    ]
    shapes = [r.shape == s.shape for s, r in zip(scenes, readings, strict=True)]
    for number, (scene, reading) in enumerate(zip(scenes, readings, strict=True)):
        if not (colours[number] and shapes[number]):
            print(f"  seed {number}: {world.caption(scene)!r} reads as {reading}")
    whole = np.logical_and(colours, shapes)
    return {
        "colours": float(np.mean(colours)),
        "shape": float(np.mean(shapes)),
        "all": float(np.mean(whole)),
    }


def obedience(engine: Engine, number: int) -> dict[str, float]:
    """Shares of pictures whose figure is where the outline has it, with and without a ControlNet,
    and of those with one both of whose colours are right, too."""
    scenes = random_scenes(number)
    places = list(world.PLACES)
    scenes = [replace(scene, place=places[n % len(places)]) for n, scene in enumerate(scenes)]
    covers = [world.draw_covered(s, np.random.default_rng([7, n]))[1] for n, s in enumerate(scenes)]
    outlines = [Image.fromarray(world.edges(cover)) for cover in covers]
    found: dict[str, float] = {}
    for name in ("with", "without"):
        requests = [
            Request(
                prompt=f"a photo of a {scene.colour} figure on a {scene.ground} background",
                seed=n,
                sampler="euler",
                steps=20,
                guidance_scale=4.0,
                controls=(Control(path="starter", image=outlines[n]),) if name == "with" else (),
            )
            for n, scene in enumerate(scenes)
        ]
        results: list[Result] = sorted(engine.generate(requests), key=lambda r: r.request.seed)
        pictures = [np.asarray(result.image) for result in results]
        found[name] = share(map(checker.follows, pictures, covers))
        if name == "with":
            readings = map(checker.read, pictures)
            both = zip(scenes, readings, strict=True)
            found["colours"] = share((s.colour, s.ground) == (r.colour, r.ground) for s, r in both)
    return found


def share(right: Iterable[bool]) -> float:
    return float(np.mean(list(right)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="starter")
    args = parser.parse_args()
    engine = Engine(load_model(args.model))
    results, sheets = {}, []
    for name, scenes in (("random", random_scenes(200)), ("left out", left_out_scenes(100))):
        pictures = draw(engine, scenes)
        results[name] = judge(scenes, pictures)
        sheets += [np.concatenate(pictures[n : n + 20], 1) for n in range(0, len(pictures), 20)]
    print(f"{'prompts':12}{'colours':>9}{'shape':>9}{'all':>9}")
    for name, shares in results.items():
        print(f"{name:12}" + "".join(f"{share:9.1%}" for share in shares.values()))
    results["outlines"] = found = obedience(engine, 200)
    print(
        f"followed its outline: {found['with']:.1%} (without a ControlNet {found['without']:.1%})"
    )
    print(f"both colours right beside it: {found['colours']:.1%}")
    out = Path(__file__).with_suffix(".json")
    out.write_text(json.dumps(results, indent=2) + "\n")
    Image.fromarray(np.concatenate(sheets)).save(out.with_suffix(".png"))


if __name__ == "__main__":
    main()
