"""The house's rules: import contracts, file sizes, and a command line that answers at once."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_no_file_is_over_400_lines() -> None:
    files = [
        path
        for folder in ("rayjobs", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 20
    assert {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 400} == {}


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from rayjobs.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'pydantic', 'pyarrow', 'numpy'}\n"
        "raise SystemExit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
