"""Where a run's curves go: TensorBoard always, W&B and MLflow where they are trackers for.

Owns the choice of Lightning's loggers. Their files are stored with the checkpoints.
"""

from pathlib import Path
from typing import Any

from pytorch_lightning import loggers

from rayjobs import storage
from rayjobs.dreambooth.config import DreamBoothConfig

FOLDER = "logs"


def build(config: DreamBoothConfig, folder: Path) -> list[Any]:
    """Loggers for the first worker; TensorBoard's events go to the local `folder`."""
    trackers = config.trackers
    wandb: Any = loggers.WandbLogger
    mlflow: Any = loggers.MLFlowLogger
    active: list[Any] = [loggers.TensorBoardLogger(str(folder), name=None, version="")]
    if trackers.wandb is not None:
        active.append(wandb(**{"name": config.run.name, **trackers.wandb}))
    if trackers.mlflow is not None:
        active.append(mlflow(**{"run_name": config.run.name, **trackers.mlflow}))
    return active


def flush(active: list[Any]) -> None:
    """Have what was logged written to files, where a tracker has files."""
    for logger in active:
        if isinstance(logger, loggers.TensorBoardLogger):
            logger.experiment.flush()


def store(output_uri: str, folder: Path) -> None:
    """Copy the events written so far to the run's folder."""
    for path in sorted(folder.rglob("events.out.*")):
        storage.put_file(storage.join(output_uri, FOLDER, path.name), path)
