"""What a submitted job brings: no more than it needs, the same bytes each time, and its name."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayjobs.cli import main
from rayjobs.config import BadInput
from rayjobs.submission import package, submit

LIMIT = 512 << 20


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A job's values, in a folder with its files and others."""
    monkeypatch.chdir(tmp_path)
    for name in ("prompts.csv", "photos/a.png", "photos/deep/b.png", "other.csv", "images/x"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("prompt\na star\n")
    values = {
        "model": {"uri": "s3://bucket/model", "base": "stabilityai/sdxl"},
        "prompts": {"uri": "./prompts.csv", "inline": ["other.csv"]},
        "init": {"uri": "photos"},
        "output": {"uri": "images"},
        "quality": {"clip": "/shared/clip"},
    }
    Path("job.yaml").write_text(yaml.safe_dump(values))
    return values


def brought(job: dict[str, Any]) -> list[str]:
    return sorted(name for name in package.files("job.yaml", job) if not package.is_code(name))


def test_what_is_named_is_brought(job: dict[str, Any]) -> None:
    assert brought(job) == ["job.yaml", "photos/a.png", "photos/deep/b.png", "prompts.csv"]
    job["init"]["uri"] = "../elsewhere"
    assert brought(job) == ["job.yaml", "prompts.csv"]
    Path("../elsewhere").mkdir()
    with pytest.raises(BadInput, match=r"\.\./elsewhere is outside of this folder"):
        brought(job)


def test_the_code_is_brought_and_the_starter_where_it_is_used(job: dict[str, Any]) -> None:
    names = package.files("job.yaml", job)
    assert {"rayjobs/__main__.py", "rayjobs/reports/page.html"} <= names.keys()
    assert not [name for name in names if "__pycache__" in name or name.endswith(".safetensors")]
    job["model"] = {"uri": "starter"}
    models = {"rayjobs/starter/model/model_index.json", "rayjobs/starter/outlines/config.json"}
    assert models <= package.files("job.yaml", job).keys()


def test_the_same_files_are_the_same_bytes(job: dict[str, Any], tmp_path: Path) -> None:
    names = package.files("job.yaml", job)
    first = package.pack(names, tmp_path / "1.zip", LIMIT)
    Path("prompts.csv").touch()
    second = package.pack(dict(reversed(names.items())), tmp_path / "2.zip", LIMIT)
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.num_bytes < 1e6
    with zipfile.ZipFile(first.path) as archive:
        assert archive.read("photos/deep/b.png") == b"prompt\na star\n"
        assert set(archive.namelist()) == set(names)


def test_too_large_a_package_is_refused(job: dict[str, Any], tmp_path: Path) -> None:
    Path("photos/large.png").write_bytes(bytes(range(256)) * 4096)
    with pytest.raises(BadInput, match=r"put what is large on s3.*photos/large.png \(1.05 MB\)"):
        package.pack(package.files("job.yaml", job), tmp_path / "x.zip", 100_000)


def test_a_job_s_name(job: dict[str, Any]) -> None:
    """The same for what makes the same, wherever it runs; another for anything else."""
    files = {"prompts.csv": "ab"}
    name = submit.name_of("generate", job, [], files)
    assert name.startswith("rayjobs-generate-")
    assert submit.name_of("generate", job | {"workers": {"min": 8}}, [], dict(files)) == name
    others = [
        submit.name_of("prior", job, [], files),
        submit.name_of("generate", job | {"output": {"uri": "s3://x"}}, [], files),
        submit.name_of("generate", job, ["--extend"], files),
        submit.name_of("generate", job, [], {"prompts.csv": "cd"}),
    ]
    assert len({name, *others}) == 5


def test_bad_input_is_told_before_anything_is_sent(
    job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    here = ("--address", "http://127.0.0.1:9")
    assert main(["submit", "generate", "job.yaml", "sampler.stps=3", *here]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["submit", "dreambooth", "job.yaml", "--extend", *here]) == 2
    assert "--extend is for generate" in capsys.readouterr().err
    assert main(["submit", "generate", "job.yaml", "prompts.inline=[]", *here]) == 2
    assert "no Ray dashboard answers at http://127.0.0.1:9" in capsys.readouterr().err
