"""What a row costs a GPU beside the UNet: launches and waits of a step, an arrival, a picture.

Made on a twin, so no GPU is needed: `python -m tests.cuda_table` prints the table of every sampler.
"""

import io
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, ModelOptions, load_model
from rayjobs.diffusion.modules.replay import NOTHING, Beside, Replay
from rayjobs.diffusion.request import Lora, Request
from rayjobs.diffusion.sampler_names import EDM, SAMPLERS
from rayjobs.diffusion.text.inversion import add_word
from tests.cuda_counts import Counts, Wait
from tests.cuda_device import TwinGpu
from tests.cuda_twin import twin_gpu

STEPS = 8
STEADY = range(3, 5)
"""Steps of a row by which each sampler has all those before that it looks at, and what is measured.
"""
WORD = "<zed>"
LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
PER_SAMPLER = ("text to image", "image to image", "inpainting")
"""Modes in which samplers differ."""
NO_IMAGES = ("ipndm",)
"""Samplers that cannot add noise to a picture."""


@dataclass(frozen=True)
class Line:
    """Launches and waits in the thread that steps: a sampler's own, or those of all the rest."""

    mode: str
    who: str
    launches: float
    """Of a steady step."""
    step: float
    """Waits of a steady step, as the columns that follow."""
    arrival: float
    preview: float | None = None
    beside: float | None = None
    """In the autoencoder's thread, for an init image."""


class NoReplay(Replay):
    """Calls without a recording, and without the proof of it, which waits once a shape."""

    def __call__(
        self,
        x_PCHW: torch.Tensor,
        t_P: torch.Tensor,
        arguments: Mapping[str, Any],
        beside: Beside = NOTHING,
    ) -> Any:
        return self._way(self.unet, x_PCHW, t_P, arguments)


def load(folder: Path) -> Model:
    """A model on a twin."""
    model = load_model(str(folder), ModelOptions(device="cuda:0", dtype="float32"))
    vars(model)["replay"] = NoReplay(model.unet)
    teach_word(model)
    return model


def modes(side: int, lora: Path) -> dict[str, dict[str, Any]]:
    """What a request asks for beside its sampler."""
    picture, mask = io.BytesIO(), io.BytesIO()
    Image.effect_noise((side, side), 40).convert("RGB").save(picture, "PNG")
    Image.linear_gradient("L").resize((side, side)).save(mask, "PNG")
    image = {"init_image": picture.getvalue(), "strength": 1.0}
    return {
        "text to image": {},
        "image to image": image,
        "inpainting": image | {"mask": mask.getvalue()},
        "LoRA, learned and weighted words": {
            "loras": (Lora(path=str(lora), scale=0.5),),
            "prompt": f"a ({WORD}:1.3) star, ",
            "prompt_syntax": "a1111",
        },
    }


def save_lora(folder: Path, width: int) -> Path:
    file = folder / "adapter.safetensors"
    down, up = torch.ones(2, width), torch.ones(width, 2)
    save_file({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up}, file)
    return file


def teach_word(model: Model) -> None:
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    add_word(model, WORD, [torch.full((2, width), 0.1) for width in widths])


@contextmanager
def networks_unobserved(gpu: TwinGpu, model: Model) -> Generator[None]:
    vae, encoders = model.vae, model.text_encoders
    with gpu.unobserved(model.unet, vae.encoder, vae.decoder, *encoders):
        yield


class Measured:
    """One batch of a row for each sampler, from its arrival until all have made their steps."""

    def __init__(self, gpu: TwinGpu, model: Model, samplers: Sequence[str], extra: dict[str, Any]):
        self.gpu, self.model, self.extra = gpu, model, extra
        self.engine = Engine(model, max_rows=len(samplers), fixed_shape=False)
        self.arrivals = {name: Counts() for name in samplers}
        self.steps = {name: Counts() for name in samplers}
        """Of each row itself; below those of the engine's steps, their rows' own among them."""
        self.all_arrivals, self.all_steps = Counts(), Counts()
        self.num_steady = 0
        self.num_own = 0
        """Launches by rows themselves."""
        self.num_rest = 0
        """Launches in steady steps by all else."""
        self.num_beside = 0
        """Waits in the autoencoder's thread, which may come at any time."""
        for lora in extra.get("loras", ()):
            self.engine.loras.load(lora.path)
        with self.gpu.counting() as counts:
            self._run()
        self.num_beside = len(counts.in_thread("autoencoder"))

    @property
    def waits(self) -> list[Wait]:
        """All in the thread that steps."""
        each = [*self.arrivals.values(), self.all_arrivals, self.all_steps, self.preview]
        return [wait for counts in each for wait in counts.in_thread()]

    def lines(self, mode: str) -> list[Line]:
        """A sampler's own each, and at last what the engine does for all rows of a step."""
        made = []
        for name, steps in self.steps.items():
            per_step = [n / len(STEADY) for n in (steps.num_launches, len(steps.in_thread()))]
            made.append(Line(mode, name, *per_step, len(self.arrivals[name].in_thread())))
        engine = Line(
            mode,
            "the engine",
            self.num_rest / self.num_steady,
            len(self.all_steps.in_thread()) / self.num_steady,
            len(self.all_arrivals.in_thread()),
            len(self.preview.in_thread()),
            self.num_beside / len(self.steps),
        )
        return [*made, engine]

    def _run(self) -> None:
        ids = []
        for seed, name in enumerate(self.steps):
            with self.gpu.counting() as counts:
                ids.append(self.engine.add(self._request(name, seed)))
            self.arrivals[name].add(counts)
            self._watch(self.engine.rows[ids[-1]], name)
        while min(map(self._position, ids)) < STEADY.stop:
            self._step()
        with self.gpu.counting() as self.preview:
            preview = self.engine.begin_preview(next(iter(self.engine.rows)))
        assert preview is not None
        assert preview.is_ready
        preview.draw()

    def _request(self, sampler: str, seed: int) -> Request:
        words = self.extra.get("prompt", "a photo of a red star, ")
        asked = {"sampler": sampler, "steps": STEPS, "seed": seed, "guidance_scale": 4.0}
        return Request(**asked | self.extra | {"prompt": f"{words}{seed}"})

    def _position(self, row_id: int) -> int:
        row = self.engine.rows.get(row_id)
        return STEPS if row is None else row.sampler.position

    def _watch(self, row: Any, name: str) -> None:
        """Count the row's own part of each step."""
        advance = row.advance

        def counted(noise_1CHW: torch.Tensor) -> None:
            position = row.sampler.position
            with self.gpu.counting() as counts:
                advance(noise_1CHW)
            self.num_own += counts.num_launches
            if position == 0:
                self.arrivals[name].add(counts)
            elif position in STEADY:
                self.steps[name].add(counts)

        row.advance = counted

    def _step(self) -> None:
        is_steady = all(row.sampler.position for row in self.engine.rows.values())
        own = self.num_own
        with self.gpu.counting() as counts:
            failed = [result.error for result in self.engine.step() if result.error]
        assert not failed, failed
        (self.all_steps if is_steady else self.all_arrivals).add(counts)
        if is_steady:
            self.num_steady += 1
            self.num_rest += counts.num_launches - (self.num_own - own)


HEAD = ["", "of", "launches a step", "waits a step", "an arrival", "a preview", "beside"]


def table(lines: Iterable[Line]) -> str:
    """In Markdown."""
    cells = [[_shown(value) for value in astuple(line)] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [HEAD, ["---"] * len(HEAD), *cells])


def _shown(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:g}"


def main() -> None:
    from tests.families import build_pipeline

    with tempfile.TemporaryDirectory() as root, twin_gpu() as gpu:
        for kind in ("sdxl", "playground"):
            build_pipeline(kind, Path(root)).save_pretrained(Path(root) / kind)
            model = load(Path(root) / kind)
            sys.stdout.write(table(all_lines(gpu, model, Path(root))) + "\n")


def all_lines(gpu: TwinGpu, model: Model, folder: Path) -> Iterator[Line]:
    names = [name for name, (kind, _) in SAMPLERS.items() if (kind in EDM) == model.is_edm]
    for mode, extra in modes(64, save_lora(folder, 32)).items():
        if mode in PER_SAMPLER:
            fitting = [n for n in names if not (n in NO_IMAGES and "init_image" in extra)]
            with networks_unobserved(gpu, model):
                yield from Measured(gpu, model, fitting, extra).lines(mode)
        else:
            yield from Measured(gpu, model, names[:1], extra).lines(f"{mode}, with the UNet")


if __name__ == "__main__":
    main()
