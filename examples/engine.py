"""The engine alone: unlike requests share its steps. Writes one PNG for each into engine-pictures/.

.venv/bin/python examples/engine.py
"""

from pathlib import Path

from rayjobs import Engine, Request, load_model

FOLDER = Path("engine-pictures")
REQUESTS = [
    Request(prompt="a photo of a red star on a blue background", seed=1, sampler="heun", steps=8),
    Request(prompt="a photo of a pink ring", seed=2, sampler="euler_a", steps=12),
    Request(prompt="a photo of a green heart", seed=3, steps=10, guidance_scale=1.0),
]


def main() -> None:
    engine = Engine(load_model("starter"), max_rows=8)
    FOLDER.mkdir(exist_ok=True)
    for result in engine.generate(REQUESTS):
        if result.image is None:
            print(f"{result.request.prompt}: {result.error}")
            continue
        path = FOLDER / f"{result.request.seed}.png"
        result.image.save(path)
        print(f"{path}: {result.request.prompt}")


if __name__ == "__main__":
    main()
