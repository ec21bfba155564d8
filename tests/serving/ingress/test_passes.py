"""Passes in a request's body: handed on as asked, and every mistake told by its field."""

from typing import Any

from rayjobs.diffusion.passes import Pass
from tests.serving.asking import ask
from tests.serving.in_process import QuickEngines, serving

GOOD = {"scale": 1.5, "strength": 0.5}


def test_passes() -> None:
    engines = QuickEngines()
    with serving(engines, limits={"max_side": 256, "max_pixels": 200 * 200}) as url:

        def told(*passes: Any, **more: Any) -> tuple[int, str]:
            status, _, body = ask(url, body={"prompt": "a star", "passes": passes, **more})
            return status, str(body.get("error", {}).get("message"))

        assert told(GOOD, {"via": "latent", "steps": 5, "sampler": "ddim"})[0] == 200
        one, two = engines.asked[-1].passes
        assert isinstance(one, Pass)
        assert (one.scale, one.strength, one.via) == (1.5, 0.5, "pixel")
        assert (two.scale, two.via, two.steps, two.sampler) == (1.0, "latent", 5, "ddim")
        for message, of_pass, of_body in (
            ("Invalid value for 'passes.1.scale': 0.5", {"scale": 0.5}, {}),
            ("Invalid value for 'passes.1.via': 'pixels'", {"via": "pixels"}, {}),
            ("Invalid value for 'passes.1.strength': 2", {"strength": 2}, {}),
            ("strength 0.01 of 30 steps leaves no step", {"strength": 0.01}, {}),
            ("unknown sampler 'eule'", {"sampler": "eule"}, {}),
            ("passes.1.steps is 600; at most", {"steps": 600}, {}),
            ("passes.1.guidance_scale is 900; at most", {"guidance_scale": 900}, {}),
            ("Unknown parameter: 'passes.1.width'", {"width": 64}, {}),
            ("make a picture of 216x216; at most 256 a side and 40000 pixels", {"scale": 2.25}, {}),
            ("make a picture of 288x96; at most 256 a side", {}, {"size": "192x64"}),
        ):
            first = GOOD if of_body else {}
            given, said = told(first, of_pass, **{"size": "96x96"} | of_body)
            assert (given, message in said) == (400, True), said
        assert told(*[GOOD] * 5)[0] == 400
