"""Copies what the manifests of this folder share into each: one cluster, one serving configuration.

Owns where a part goes. `make kuberay` after an edit of cluster.yaml or of configs/serve.yaml; a
test keeps them equal. Text, not values: comments and anchors stay.
"""

import re
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("generate.yaml", "dreambooth.yaml", "nightly.yaml", "serve.yaml")
MARK = re.compile(r"( *)\w+:(?: \|)? # from ([\w./]+)")
"""A key whose value is another file's: that of cluster.yaml is its spec."""


def rendered(name: str) -> str:
    """The manifest with every copied part as its source has it now."""
    lines, out = (HERE / name).read_text("utf-8").splitlines(), []
    at = 0
    while at < len(lines):
        out.append(lines[at])
        found = MARK.fullmatch(lines[at])
        at += 1
        if found:
            margin = found[1] + "  "
            out += [f"{margin}{line}".rstrip() for line in _source(found[2])]
            while at < len(lines) and (not lines[at] or lines[at].startswith(margin)):
                at += 1
    return "\n".join(out) + "\n"


def _source(name: str) -> list[str]:
    if name != "cluster.yaml":
        return (HERE.parents[1] / name).read_text("utf-8").splitlines()
    text = (HERE / name).read_text("utf-8")
    return [line[2:] for line in text.partition("\nspec:\n")[2].splitlines()]


if __name__ == "__main__":
    for each in FILES:
        (HERE / each).write_text(rendered(each), "utf-8")
