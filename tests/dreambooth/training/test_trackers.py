"""Trackers of a run that is started again, and the files that they leave."""

from pathlib import Path
from typing import Any

import pytest

from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.training import trackers


def config(output: str, **tracker: Any) -> DreamBoothConfig:
    return DreamBoothConfig.model_validate(
        {
            "model": {"uri": "starter"},
            "instance": {"uri": "dogs", "prompt": "a photo of sks dog"},
            "prior": {"mode": "none"},
            "trackers": tracker,
            "run": {"name": "dog"},
            "output": {"uri": output},
        }
    )


def test_a_run_that_is_started_again_has_one_run_of_wandb(tmp_path: Path) -> None:
    made = [
        trackers._wandb_settings(config(output, wandb=given), tmp_path)
        for output, given in [("a", {}), ("a", {"project": "x"}), ("b", {}), ("a", {"id": "mine"})]
    ]
    ids = [settings["id"] for settings in made]
    assert ids[0] == ids[1] != ids[2]
    assert ids[3] == "mine"
    assert made[0]["save_dir"] == str(tmp_path), "its files are stored from there"
    assert "id" not in trackers._wandb_settings(config("a", wandb={"version": "v"}), tmp_path)


@pytest.mark.parametrize("has_server", [True, False])
def test_and_one_of_mlflow(
    has_server: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    class Logger:
        def __init__(self, **settings: Any):
            seen.append(settings)
            self.run_id = settings.get("run_id") or f"run-{len(seen)}"

    monkeypatch.setattr(trackers.loggers, "MLFlowLogger", Logger)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = {"tracking_uri": "http://there"} if has_server else {}
    for _ in range(3):
        trackers._mlflow(config(str(tmp_path), mlflow=given), tmp_path)
    again = "run-1" if has_server else None
    assert [settings.get("run_id") for settings in seen] == [None, again, again]


def test_files_of_trackers_are_stored(tmp_path: Path) -> None:
    logs, output = tmp_path / "logs", tmp_path / "out"
    names = ("events.out.tfevents.1", "wandb/offline-run-1/run-1.wandb", "mlruns/0/meta.yaml")
    for name in (*names, "hparams.yaml"):
        (logs / name).parent.mkdir(parents=True, exist_ok=True)
        (logs / name).write_text(name)
    (logs / "wandb" / "latest-run").symlink_to(logs / "wandb" / "offline-run-1")
    trackers.store(str(output), logs)
    stored = {path for path in (output / "logs").rglob("*") if path.is_file()}
    assert stored == {output / "logs" / name for name in names}
