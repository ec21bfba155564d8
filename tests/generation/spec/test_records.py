"""The job's arithmetic against plain nested loops."""

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayjobs.config import BadInput
from rayjobs.dataset.records import COLUMNS
from rayjobs.generation.config import ECONOMY, GenerateConfig
from rayjobs.generation.prompts.snapshot import InlinePrompts, Snapshot, write_snapshot
from rayjobs.generation.prompts.templates import TemplateTexts, permuted
from rayjobs.generation.spec.lock import job_part, record_schema
from rayjobs.generation.spec.records import Spec

COLOURS = ["red", "blue", "green"]
GROUNDS = ["sand", "sea", "ice"]


def job(prompts: dict[str, Any], **parts: Any) -> GenerateConfig:
    base = {"model": {"uri": "m"}, "output": {"uri": "o", "images_per_shard": 5}}
    return GenerateConfig.model_validate(base | {"prompts": prompts} | parts)


def build(prompts: dict[str, Any], inits: tuple[str, ...] = (), **parts: Any) -> Spec:
    config = job(prompts, **parts)
    return Spec(config, InlinePrompts(config.prompts), inits)


def from_file(tmp_path: Path, text: str, inits: tuple[str, ...] = (), **parts: Any) -> Spec:
    file = tmp_path / "p.csv"
    file.write_text(text)
    config = job({"uri": str(file)}, **parts)
    write_snapshot(config.prompts, str(tmp_path / "snapshot.parquet"))
    return Spec(config, Snapshot(str(tmp_path / "snapshot.parquet")), inits)


def prompts_of(spec: Spec) -> list[str]:
    return [spec.record(k).prompt for k in range(spec.num_records)]


def test_every_combination_once_in_order() -> None:
    prompts = {
        "inline": ["star", "ring"],
        "templates": ["a {prompt}", "a {colour} {prompt} on {ground}"],
        "axes": {"colour": ["red", "blue"], "ground": GROUNDS},
    }
    inits = ("a.png", "b.png")
    spec = build(prompts, inits, seeds={"start": 7, "count": 2}, init={"uri": "pics"})
    expected = [
        (text, init, seed)
        for prompt in prompts["inline"]
        for text in [
            f"a {prompt}",
            *(f"a {c} {prompt} on {g}" for c, g in itertools.product(*prompts["axes"].values())),
        ]
        for init in inits
        for seed in (7, 8)
    ]
    records = [spec.record(k) for k in range(len(spec))]
    assert [(r.prompt, r.init_image, r.seed) for r in records] == expected
    assert records[0].init_uri == "pics/a.png"
    with pytest.raises(IndexError):
        spec.record(len(spec))


def test_a_long_prefix_of_everything_together() -> None:
    words = [f"w{n}" for n in range(40)]
    prompts = {"inline": ["x", "y"], "templates": ["{b} {prompt} {a}"]}
    prompts["axes"] = {"a": words, "b": words}
    parameters = {"sampler": ["euler", "ddim"], "steps": [4, 8], "guidance_scale": [1.0, 5.0, 7.5]}
    spec = build(prompts, parameters=parameters, seeds={"values": [3, 1, 2]})
    expected = (
        (f"{b} {prompt} {a}", sampler, steps, scale, seed)
        for prompt in prompts["inline"]
        for b in words
        for a in words
        for sampler in parameters["sampler"]
        for steps in parameters["steps"]
        for scale in parameters["guidance_scale"]
        for seed in (3, 1, 2)
    )
    count = 0
    for k, wanted in enumerate(itertools.islice(expected, 100_000)):
        record = spec.record(k)
        found = (record.prompt, record.sampler, record.steps, record.guidance_scale, record.seed)
        assert found == wanted, k
        count += 1
    assert count == 100_000
    assert spec.num_records == 2 * 1600 * 12 * 3


def test_words_by_place() -> None:
    prompts = {
        "inline": ["star", "ring"],
        "templates": ["{colour} {prompt} on {ground}", "plain {prompt}", "{ground}"],
        "axes": {"colour": COLOURS, "ground": GROUNDS},
        "mode": "zip",
    }
    expected = [
        text
        for prompt in prompts["inline"]
        for text in [
            *(f"{c} {prompt} on {g}" for c, g in zip(COLOURS, GROUNDS, strict=True)),
            f"plain {prompt}",
            *GROUNDS,
        ]
    ]
    assert prompts_of(build(prompts)) == expected


def test_parameter_axes_in_the_order_of_their_fields() -> None:
    parameters = {
        "strength": [0.5, 1.0],
        "height": [64, 128],
        "width": [64, 256],
        "negative_prompt": ["", "blurry"],
        "clip_skip": [0, 1],
        "guidance_rescale": [0.0, 0.7],
        "steps": [10, 20],
    }
    spec = build(
        {"inline": "x"}, ("a.png",), parameters=parameters, init={"uri": "p"}, image={"width": 8}
    )
    expected = [
        (steps, rescale, skip, negative, *size, strength)
        for steps in (10, 20)
        for rescale in (0.0, 0.7)
        for skip in (0, 1)
        for negative in ("", "blurry")
        for size in ((64, 64), (256, 128))
        for strength in (0.5, 1.0)
    ]
    found = [
        (
            r.steps,
            r.guidance_rescale,
            r.clip_skip,
            r.negative_prompt,
            r.width,
            r.height,
            r.strength,
        )
        for r in map(spec.record, range(spec.num_records))
    ]
    assert found == expected
    alone = build({"inline": "x"}, parameters={"width": [64, 72]}, image={"height": 80})
    assert [(alone.record(k).width, alone.record(k).height) for k in range(2)] == [
        (64, 80),
        (72, 80),
    ]


def samples(prompts: list[str], number: int, seed: int = 0) -> dict[str, list[str]]:
    axes = {"colour": COLOURS, "ground": GROUNDS, "n": ["0", "1"]}
    config = {
        "inline": prompts,
        "templates": ["{colour} {ground} {n} {prompt}"],
        "axes": axes,
        "mode": "sample",
        "samples": number,
        "sample_seed": seed,
    }
    found = prompts_of(build(config))
    return {prompt: found[n * number : (n + 1) * number] for n, prompt in enumerate(prompts)}


def test_a_sample_is_drawn_without_repeats() -> None:
    product = {" ".join(words) for words in itertools.product(COLOURS, GROUNDS, "01", ["star"])}
    whole = samples(["star"], 18)["star"]
    assert len(whole) == 18
    assert set(whole) == product
    assert whole != sorted(whole)
    part = samples(["star", "ring"], 7)
    assert part["star"] == whole[:7]
    assert samples(["moon", "ring"], 7)["ring"] == part["ring"]
    assert [text.removesuffix("ring") for text in part["ring"]] != [
        text.removesuffix("star") for text in part["star"]
    ]
    assert samples(["star"], 18, seed=1)["star"] != whole


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000])
def test_a_permutation_covers_everything_once(size: int) -> None:
    assert sorted(permuted(n, size, b"key") for n in range(size)) == list(range(size))


def test_a_sample_favours_nothing() -> None:
    keys = [hashlib.sha256(bytes([n % 256, n // 256])).digest() for n in range(3000)]
    for size in (2, 3, 5, 18):
        firsts = Counter(permuted(0, size, key) for key in keys)
        chi = sum((firsts[n] - 3000 / size) ** 2 / (3000 / size) for n in range(size))
        assert chi < size - 1 + 5 * (2 * size) ** 0.5


def test_seeds_are_derived_from_their_prompt() -> None:
    seeds = {"derive": 3, "job_seed": 11}
    spec = build({"inline": ["a", "ü b"]}, seeds=seeds)
    expected = [
        int.from_bytes(hashlib.sha256(f"11|{prompt}|{n}".encode()).digest()[:8], "big") >> 1
        for prompt in ("a", "ü b")
        for n in range(3)
    ]
    assert [spec.record(k).seed for k in range(6)] == expected
    more = build({"inline": ["new", "a", "ü b"]}, seeds=seeds)
    assert [more.record(k).seed for k in range(3, 9)] == expected


def test_rows_override_and_pass_through(tmp_path: Path) -> None:
    spec = from_file(
        tmp_path,
        "prompt,seed,steps,width,guidance_scale,negative_prompt,init_image,category\n"
        "one,5,9,128,2.5,blurry,x.png,first\n"
        "two,,,,,,,\n",
        sampler={"steps": 3},
        seeds={"count": 2},
    )
    first, second, third, _ = (spec.record(k) for k in range(len(spec)))
    assert (first.seed, first.steps, first.width, first.guidance_scale) == (5, 9, 128, 2.5)
    assert (first.negative_prompt, first.init_uri) == ("blurry", str(tmp_path / "x.png"))
    assert first.init_image == "x.png"
    assert first.passed_through == {"category": "first"}
    assert second.seed == 6
    assert (third.seed, third.steps, third.width, third.init_image) == (0, 3, None, None)


def test_what_rows_leave_out_may_vary_and_has_columns_only_where_it_does(tmp_path: Path) -> None:
    text = 'prompt,guidance_interval\na,"[0, 0.5]"\nb,\n'
    parts = {"parameters": {"cache_interval": [1, 3]}, "sampler": {"guidance_interval": [0.2, 1]}}
    spec = from_file(tmp_path, text, **parts)
    assert [spec.record(k).economy for k in range(4)] == [
        {"guidance_interval": [0, 0.5], "cache_interval": 1},
        {"guidance_interval": [0, 0.5], "cache_interval": 3},
        {"guidance_interval": (0.2, 1), "cache_interval": 1},
        {"guidance_interval": (0.2, 1), "cache_interval": 3},
    ]
    assert record_schema(spec.config, spec.rows).names[25:] == [
        "guidance_interval",
        "cache_interval",
    ]
    assert {"cache_interval"} == {*job_part(spec.config)["parameters"]} & ECONOMY.keys()
    (tmp_path / "plain").mkdir()
    plain = from_file(tmp_path / "plain", "prompt\na\n", sampler={"cache_interval": 1})
    assert plain.record(0).economy == {}
    assert record_schema(plain.config, plain.rows).names == [*COLUMNS]
    assert not {*job_part(plain.config)["parameters"]} & ECONOMY.keys()
    with pytest.raises(ValueError, match="must be two shares of the schedule"):
        build({"inline": "x"}, parameters={"guidance_interval": [[0.5, 0.2]]})
    with pytest.raises(BadInput, match=r"parameters\.guidance_interval and the column"):
        from_file(tmp_path, text, parameters={"guidance_interval": [[0, 0.2]]})


@pytest.mark.parametrize("seeds", [{"values": [9, 4]}, {"derive": 2}, {"count": 2, "start": 8}])
def test_a_rows_seed_counts_on_whatever_the_way(tmp_path: Path, seeds: dict[str, Any]) -> None:
    spec = from_file(tmp_path, f"prompt,seed\na,70\nb,{2**63 - 1}\n", seeds=seeds)
    assert [spec.record(k).seed for k in range(4)] == [70, 71, 2**63 - 1, 0]


def test_two_owners_of_one_value_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"parameters\.steps and the column steps of .*p\.csv both"):
        from_file(tmp_path, "prompt,steps\na,3\n", parameters={"steps": [3, 4]})
    with pytest.raises(BadInput, match=r"parameters\.height and the column height"):
        from_file(tmp_path, "prompt,height\na,8\n", parameters={"width": [8], "height": [8]})
    with pytest.raises(BadInput, match=r"init\.uri, pics, and the column init_image"):
        from_file(tmp_path, "prompt,init_image\na,x.png\n", ("a.png",), init={"uri": "pics"})
    with pytest.raises(BadInput, match="strength changes nothing without init images"):
        build({"inline": "x"}, parameters={"strength": [0.5]})


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        (
            {"templates": "{a} {b}", "axes": {"a": "xy", "b": "x"}, "mode": "zip"},
            "'{a} {b}' have a 2, b 1 values",
        ),
        ({"mode": "sample", "samples": 5}, "samples is 5, but '{a} {b}' has only 4 combinations"),
        ({"samples": 3}, "samples needs prompts.mode sample, but it is product"),
        ({"mode": "sample"}, "mode sample needs prompts.samples"),
        ({"templates": "{a} {b} {c}"}, "has {c}, but there is no such axis"),
        ({"templates": "{a}"}, "axes.b is used by no template"),
        ({"templates": "{a} {b:>9}"}, "a placeholder is a name alone, as in {b}"),
        ({"templates": "{a} {b"}, "expected '}' before end of string"),
        ({"templates": "{a} {b} {}"}, "has {}, but there is no such axis"),
        ({"axes": {"prompt": ["x"]}}, "list them as inline"),
        ({"templates": "{a} {b}\0"}, "NUL"),
    ],
)
def test_words_that_cannot_go_together(prompts: dict[str, Any], told: str) -> None:
    base = {"templates": ["{a} {b}"], "axes": {"a": ["x", "y"], "b": ["x", "y"]}}
    whole = base | prompts
    whole["axes"] = {name: list(words) for name, words in whole["axes"].items()}
    with pytest.raises(ValueError, match="prompts") as caught:
        job(whole)
    assert told in str(caught.value)


def test_a_configuration_reads_its_own_dump() -> None:
    for seeds in ({"derive": 2}, {"values": [1, 2]}, {"start": 3, "count": 4}):
        config = job({"inline": "x"}, seeds=seeds, parameters={"steps": [1, 2]})
        assert GenerateConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"seeds": {"derive": 2, "count": 3}}, "give one of start, count / derive"),
        ({"parameters": {"steps": [4, 5, 4]}}, "steps: a value is there twice"),
        ({"parameters": {"width": [8, 8], "height": [8, 8]}}, "width and height: a value"),
    ],
)
def test_values_that_would_repeat_images(parts: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        job({"inline": "x"}, **parts)


@pytest.fixture(scope="module")
def million() -> list[str]:
    return [f"w{n}" for n in range(10**6)]


def test_a_record_of_a_huge_job_costs_nothing(million: list[str]) -> None:
    template = "{a} {b} {c} {d} {e}"
    axes = dict.fromkeys("abcde", million)
    product = TemplateTexts([template], axes)
    assert product.num == 10**30
    assert product.text("", 10**30 - 1) == " ".join(["w999999"] * 5)
    assert product.text("", 1_000002_000003_000004_000005) == "w1 w2 w3 w4 w5"
    sample = TemplateTexts([template], axes, "sample", 10**29)
    found = [sample.text("star", n) for n in itertools.chain(range(2000), [10**29 - 1])]
    assert len(set(found)) == 2001


def test_more_records_than_len_can_hold() -> None:
    axes = {name: [str(n) for n in range(1000)] for name in "abcde"}
    spec = build({"templates": ["{a}{b} {c}{d}{e}"], "axes": axes}, seeds={"derive": 10**15})
    assert spec.num_records == 10**30 > sys.maxsize
    assert spec.num_shards == 2 * 10**29
    assert spec.record(10**30 - 1).prompt == "999999 999999999"


def test_a_part_begins_at_a_later_prompt_or_seed() -> None:
    prompts = {"inline": ["a", "b", "c"], "templates": ["{prompt} {x}"], "axes": {"x": ["1", "2"]}}
    for seeds in ({"count": 4, "start": 9}, {"values": [7, 5, 3, 1]}, {"derive": 4}):
        config = job(prompts, seeds=seeds, parameters={"steps": [1, 2]})
        rows = InlinePrompts(config.prompts)
        whole = list(_essence(Spec(config, rows)))
        assert list(_essence(Spec(config, rows, first_prompt=1))) == whole[16:]
        late = list(_essence(Spec(config, rows, first_seed=3)))
        assert late == whole[3::4]
        both = list(_essence(Spec(config, rows, first_prompt=2, first_seed=2)))
        assert both == [w for k, w in enumerate(whole) if k >= 32 and k % 4 >= 2]
    assert Spec(config, rows, first_seed=4).num_records == 0
    assert Spec(config, rows, first_prompt=3).num_shards == 0


def _essence(spec: Spec) -> Iterator[tuple[str, int, int]]:
    for k in range(spec.num_records):
        record = spec.record(k)
        assert record.number == k
        yield record.prompt, record.steps, record.seed
