"""DreamBooth from Python: a short training of the starter model, then a picture of its subject.

.venv/bin/python examples/dreambooth.py [PHOTOS [STEPS]]
"""

import sys

from rayjobs import Engine, Request, cli, load_model
from rayjobs.models import exports
from rayjobs.starting import CONFIGS

PHOTOS = CONFIGS / "demo" / "subject"
RUN = "dreambooth-run"


def main(photos: str, steps: str) -> None:
    code = cli.main(
        [
            "dreambooth",
            str(CONFIGS / "demo" / "dreambooth.yaml"),
            f"instance.uri={photos}",
            f"output.uri={RUN}",
            f"train.steps={steps}",
            "train.warmup_steps=0",
            "prior.num_images=4",
            "workers.min=1",
            f"checkpoint.every_n_steps={steps}",
            "validation.every_n_steps=0",
            "validation.steps=12",
        ]
    )
    if code:
        raise SystemExit(code)
    note = exports.read(f"{RUN}/export")
    assert note is not None
    engine = Engine(load_model(f"{RUN}/export"), max_rows=1)
    for result in engine.generate([Request(prompt=note.instance_prompt, seed=1, steps=12)]):
        assert result.image is not None
        result.image.save("subject.png")
    print(f"subject.png: {note.instance_prompt}, after {note.step} steps")


if __name__ == "__main__":
    photos, steps = [*sys.argv[1:], *[str(PHOTOS), "200"][len(sys.argv) - 1 :]]
    main(photos, steps)
