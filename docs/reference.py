"""Writes docs/reference.md from the docstrings of the configuration models (make reference)."""

from pathlib import Path

from rayjobs import keys

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Reference of configuration keys

<!-- Written by `make reference` from the models' docstrings; a test keeps it current. -->

Any key of a file is overridden on the command line as `key=value`, with the value in YAML:
`sampler.steps=40`, `'prompts={inline: [a star]}'`. Text is taken as it is written, also `no`, `010`
or `a star #1`; `null` gives a key its default back. An unknown key is refused. `[]` in a key stands
for each item of a list. `rayjobs show FILE` prints a generation job with every default, and
`rayjobs init KIND` writes a file with every key.
"""
ABOUT = {
    "generate": "`rayjobs generate FILE`, `plan`, `show`. See [Generate](guides/generate.md).",
    "prior": "`rayjobs prior FILE`. See [Generate](guides/generate.md#class-images).",
    "dreambooth": "`rayjobs dreambooth FILE`. See [DreamBooth](guides/dreambooth.md).",
    "evaluate": "`rayjobs evaluate FILE`. See [DreamBooth](guides/dreambooth.md#evaluate).",
    "serve": "An application's `args` in `python -m serve run FILE`. See [Serve](guides/serve.md).",
    "export": "`rayjobs export URI KEY=VALUE ...`. See [Generate](guides/generate.md#export).",
    "build_processor": "`rayjobs.generation.ProcessorConfig`, for "
    "[a pipeline of your own](guides/generate.md#in-a-pipeline-of-your-own).",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for kind, about in ABOUT.items():
        parts.append(f"## {kind}\n\n{about}\n\n{keys.reference(keys.model_of(kind))}")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
