"""Which calls a row makes, in pure Python."""

import pytest

from rayjobs.diffusion.economy.plan import REUSE_COST, Call, count_slots, plan_calls
from rayjobs.diffusion.request import Request


def drawn(calls: tuple[Call, ...]) -> str:
    """G with guidance and g without it, of the outermost blocks alone in brackets."""
    letters = ("G" if call.guided else "g" for call in calls)
    return "".join(f"({x})" if c.reuses else x for x, c in zip(letters, calls, strict=True))


def test_guidance_is_on_between_two_shares_of_the_schedule() -> None:
    assert drawn(plan_calls(5)) == "GGGGG"
    assert drawn(plan_calls(10, 0, (0.2, 0.7))) == "ggGGGGGggg"
    assert drawn(plan_calls(4, 6, (0.2, 0.7))) == "Gggg"  # image-to-image has the later part
    assert drawn(plan_calls(3, 0, (0.0, 0.5))) == "Ggg"


def test_deep_blocks_are_computed_at_every_nth_call_and_where_guidance_sets_in() -> None:
    assert drawn(plan_calls(5, 0, None, 1)) == "GGGGG"
    assert drawn(plan_calls(8, 0, None, 3)) == "G(G)(G)G(G)(G)G(G)"
    assert drawn(plan_calls(8, 0, (0.25, 0.75), 4)) == "g(g)G(G)G(G)(g)(g)"
    assert drawn(plan_calls(4, 4, None, 2)) == "G(G)G(G)"  # counted from the row's own first


def test_only_what_the_next_call_takes_is_kept() -> None:
    calls = plan_calls(7, 0, (0.3, 1.0), 3)
    assert [call.keeps for call in calls] == [True, False, False, True, False, False, False]
    assert drawn(calls) == "g(g)GG(G)(G)G"


def test_what_calls_cost() -> None:
    assert count_slots(plan_calls(10), 2) == 20
    assert count_slots(plan_calls(10), 1) == 10
    assert count_slots(plan_calls(10, 0, (0.2, 0.7)), 2) == 15
    assert count_slots(plan_calls(4, 0, None, 2), 2) == pytest.approx(4 + 4 * REUSE_COST)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"guidance_interval": (0.8, 0.2)}, r"is \[0.8, 0.2\]; it must be two shares"),
        ({"guidance_interval": (0.0, 1.1)}, r"is \[0.0, 1.1\]; it must be two shares"),
        ({"guidance_interval": (0.0, float("nan"))}, "two shares of the schedule"),
        ({"guidance_interval": (0.5,)}, r"\[0.5\]; it must be two shares"),
        ({"cache_interval": 0}, "cache_interval is 0; it must be at least 1"),
        ({"timesteps": (500, 500)}, "timesteps has 500 after 500; each must be below the last"),
        ({"timesteps": (1000,)}, r"timesteps has 1000; each must be a whole number in 0 \.\. 999"),
        ({"timesteps": (9.5,)}, "timesteps has 9.5; each must be a whole number"),
        ({"timesteps": ()}, r"timesteps is \[\]; give at least that of one step"),
        ({"sigmas": (2.0,)}, "give at least that of one step and, last, where it ends"),
        ({"sigmas": (float("inf"), 1.0)}, "sigmas has inf; each must be a number of at least 0"),
        ({"sigmas": (1.0, 0.0), "timesteps": (3,)}, "timesteps and sigmas are both given"),
        ({"sigmas": (1.0, 0.0), "steps": 2}, "steps is 2, but sigmas are of 1; leave steps out"),
        ({"timesteps": (9, 3), "steps": 3}, "steps is 3, but timesteps are of 2"),
        ({"timesteps": (9, 3), "init_image": "x", "strength": 0.4}, "leaves no step to make"),
    ],
)
def test_what_cannot_be_asked_for_is_told(values: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Request(prompt="a", **values).check()  # ty: ignore[invalid-argument-type]
