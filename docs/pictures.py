"""Makes the pictures of the README from the starter model (make pictures)."""

from pathlib import Path

import numpy as np
from PIL import Image

from rayjobs import Engine, Request, load_model
from rayjobs.diffusion.request import Control
from rayjobs.diffusion.vae.latents import decode_latents, to_image
from rayjobs.diffusion.vae.preview import Previewer
from rayjobs.starter import world

FOLDER = Path(__file__).parent / "pictures"
CELL, GAP = 96, 4
PAPER = (250, 250, 250)
COLOURS = [("red", "white"), ("cyan", "purple"), ("yellow", "black")]
SHEET = [
    f"a photo of a {colour} {shape} on a {ground} background"
    for shape in ("star", "ring", "heart", "cross")
    for ground in ("white", "black")
    for colour in ("red", "blue", "green", "yellow")
]
FORMING = [
    Request(prompt=f"a photo of a {what} background", seed=seed, steps=20, sampler=sampler)
    for seed, (what, sampler) in enumerate(
        [
            ("red star on a blue", "euler"),
            ("yellow cross on a black", "heun"),
            ("blue ring on a white", "euler_a"),
            ("green heart on a pink", "dpmpp_2m_karras"),
        ]
    )
]


def contact_sheet(engine: Engine) -> Image.Image:
    requests = [Request(prompt=prompt, seed=1, steps=20) for prompt in SHEET]
    made = {result.request.prompt: result.image for result in engine.generate(requests)}
    return grid([made[prompt] for prompt in SHEET], 8)


def forming(engine: Engine) -> list[Image.Image]:
    """One frame for each step: four rows with four samplers, as far as each is known."""
    previewer = Previewer(engine.model)
    blank = Image.new("RGB", (64, 64), PAPER)
    shown = {engine.add(request): blank for request in FORMING}
    frames = []
    while engine.num_pending:
        finished = {result.id: result.image for result in engine.step()}
        for row_id, row in engine.rows.items():
            if row.last_step is not None:
                latents = previewer.denoised(row).to(engine.model.vae.dtype)
                shown[row_id] = to_image(decode_latents(latents, engine.model)[0])
        shown |= {row_id: image for row_id, image in finished.items() if image is not None}
        frames.append(grid(list(shown.values()), 2))
    return frames


def following(engine: Engine) -> Image.Image:
    """Outlines, and below each three pictures that follow it, of prompts that name no shape."""
    columns = []
    for number, shape in enumerate(("star", "heart", "cross", "ring", "diamond", "triangle")):
        place = list(world.PLACES)[number % len(world.PLACES)]
        scene = world.Scene("red", shape, "white", place=place)
        _, cover = world.draw_covered(scene, np.random.default_rng(number))
        outline = Image.fromarray(world.edges(cover))
        requests = [
            Request(
                prompt=f"a photo of a {colour} figure on a {ground} background",
                seed=seed,
                steps=20,
                controls=(Control(path="starter", image=outline),),
            )
            for seed, (colour, ground) in enumerate(COLOURS)
        ]
        made = {result.request.seed: result.image for result in engine.generate(requests)}
        columns.append([outline, *(made[seed] for seed in range(len(COLOURS)))])
    rows = zip(*columns, strict=True)
    return grid([picture for row in rows for picture in row], len(columns))


def grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    rows = -(-len(pictures) // columns)
    step = CELL + GAP
    sheet = Image.new("RGB", (columns * step + GAP, rows * step + GAP), PAPER)
    for number, picture in enumerate(pictures):
        place = (number % columns * step + GAP, number // columns * step + GAP)
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), place)
    return sheet


def main() -> None:
    engine = Engine(load_model("starter"), max_rows=8)
    contact_sheet(engine).save(FOLDER / "contact-sheet.webp", quality=85)
    following(engine).save(FOLDER / "following.webp", quality=85)
    frames = forming(engine)
    durations = [90] * (len(frames) - 1) + [2500]
    frames[0].save(
        FOLDER / "forming.webp",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        quality=70,
    )


if __name__ == "__main__":
    main()
