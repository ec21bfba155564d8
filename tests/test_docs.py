"""The documentation is true: links, keys, modules and commands exist, the reference is new."""

import argparse
import re
from functools import cache
from pathlib import Path

import pytest

from docs import reference
from rayjobs import keys
from rayjobs.cli import arguments
from rayjobs.diffusion.sampler_names import SAMPLERS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|[ `(])(?:rayjobs|python -m rayjobs) ([a-z]+)\b([^\n]*)", re.MULTILINE)
KEY = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`")
MODULE = re.compile(r"`((?:rayjobs|serve|tests|docs|examples|configs)/[\w/.]+)`")
OVERRIDE = re.compile(r"(?<=[ '])([a-z_]+(?:\.[a-z_]+)+)=")
NOT_KEYS = re.compile(
    r"^(rayjobs|serve|http_options|runtime_env|ray|image|modelspec|edm_vpred)\.|\.(py|md|json|jsonl|yaml|txt|jpg|html|toml|csv|caption|png|bin|safetensors|parquet)$"
)


def named(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@cache
def known_keys() -> set[str]:
    found: set[str] = set()
    for kind in keys.MODELS:
        for key in keys.keys(keys.model_of(kind)):
            parts = key.path.replace("[]", "").split(".")
            found |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return found


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each).strip().lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_modules_and_keys_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md" or page.parent.name == "decisions":
        pytest.skip("tells of what was")
    text = page.read_text("utf-8")
    for path in MODULE.findall(text):
        assert (ROOT / path).exists(), path
    for key in {*KEY.findall(text), *OVERRIDE.findall(text)}:
        if not NOT_KEYS.search(key):
            bare = key.removeprefix("args.")
            assert bare in known_keys(), key


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_commands_exist(page: Path) -> None:
    parser = arguments.build()
    actions = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    commands = actions[0].choices
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for name, rest in COMMAND.findall("\n".join(blocks)):
        assert name in commands, name
        options = {option for action in commands[name]._actions for option in action.option_strings}
        for option in re.findall(r" (--[a-z-]+)", rest.partition("#")[0]):
            assert option in options, f"{name} {option}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.M))
    known = {name for target in targets for name in target.split()}
    for page in PAGES:
        for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE):
            assert name in known, f"{page.name}: make {name}"


def test_the_reference_is_current() -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "run `make reference`"


def test_every_sampler_is_named() -> None:
    text = (ROOT / "docs/guides/generate.md").read_text("utf-8")
    section = text.partition("\n## Samplers\n")[2].partition("\n\n`sampler.name`")[0]
    assert section.split() == [f"`{name}`" for name in sorted(SAMPLERS)]


def test_every_key_is_described() -> None:
    for kind in keys.MODELS:
        assert [k.path for k in keys.keys(keys.model_of(kind)) if not k.text] == [], kind
