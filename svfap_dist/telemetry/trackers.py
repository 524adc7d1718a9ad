"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, each behind the same protocol.

To add one, write a class with the methods of `Tracker` and add it to TRACKERS; its name is a key of
the recipe's [track]. All methods are called by one thread (see `tracking`) and may fail or take
long. Packages are imported there, when a run opens its tracker. Secrets come from the environment
(WANDB_API_KEY, MLFLOW_TRACKING_TOKEN, ...), which the packages read themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from svfap_dist import storage
from svfap_dist.config import TrackConfig
from svfap_dist.errors import ConfigError

log = logging.getLogger(__name__)

Reference = dict[str, str]
_UPLOAD_EVERY_SECONDS = 30.0
_PARAMETERS_TOGETHER = 100  # the most that MLflow accepts in a request
_LONGEST_PARAMETER = 500  # that every MLflow server accepts
_LONGEST_METRIC = 250  # its name
_NOT_IN_A_METRIC = re.compile(r"[^\w.\- :]")  # nor may a part between slashes be "", "." or ".."
_DELETED_FROM_WANDB = "previously created and deleted"  # W&B accepts such an id never again
_DEFAULTS = {
    # Of MLflow's client: for a server that does not answer, minutes per request are too much.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # of the package's use, to its makers
}
# What W&B decides by without a request; only if none is set, it is imported to look further.
_WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_WANDB_WITHOUT_KEY = ("offline", "dryrun", "disabled")  # its modes that need no account


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given when an attempt at a run opens it.

    step: completed optimizer steps, after which earlier attempts' values do not count.
    reference: what `Tracker.open` returned to an earlier attempt; {}: there was none.
    """

    name: str
    url: str
    recipe: str  # as TOML
    sections: dict[str, Any]  # of the recipe
    step: int = 0
    reference: Reference = dataclasses.field(default_factory=dict)

    def parameters(self) -> dict[str, str]:
        """Return the recipe's values by section.name, as texts."""
        return {
            f"{section}.{name}": str(value)
            for section, values in self.sections.items()
            for name, value in (values or {}).items()
        }


class Tracker(Protocol):
    """Where the numbers, texts and pictures of a run are sent."""

    module: ClassVar[str]  # that must be installed
    extra: ClassVar[str]  # of this package, which installs it

    def __init__(self, track: TrackConfig) -> None: ...

    def open(self, run: TrackedRun) -> Reference:
        """Begin a tracked run, or continue the one of `run.reference`.

        After an error it is called again, and must continue what it began before.

        Args:
            run: What is tracked.

        Returns:
            What to find it by, which is kept in the run's folder; "url" is shown to the user.
        """
        ...

    def write_recipe(self, run: TrackedRun) -> None:
        """Set the recipe and the URL of the run.

        Args:
            run: What is tracked.
        """
        ...

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers.

        Args:
            step: Completed optimizer steps.
            values: By name, such as "train/loss".
        """
        ...

    def write_facts(self, facts: Mapping[str, str]) -> None:
        """Set texts about the run, such as versions of packages.

        Args:
            facts: By name.
        """
        ...

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        """Add a picture.

        Args:
            name: Such as "confusion".
            step: Completed optimizer steps.
            png: Content of a PNG file.
        """
        ...

    def close(self, failed: bool) -> None:
        """Write what is pending and end the attempt.

        Args:
            failed: Whether an error ends it.
        """
        ...

    def abandon(self) -> None:
        """Drop what would make this process wait at its end; another thread may hang in a call."""
        ...


class TensorBoard:
    """Event files below tensorboard/ in the run's folder, one for each attempt.

    Args:
        track: The recipe's section.
    """

    module: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"

    def __init__(self, track: TrackConfig) -> None:
        self._writer: Any = None
        self._closing = contextlib.ExitStack()
        self._url, self._folder, self._uploaded = "", "", time.monotonic()

    def open(self, run: TrackedRun) -> Reference:
        """See `Tracker.open`."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self._url = storage.join(run.url, "tensorboard")
        if storage.is_remote(self._url):  # an object store cannot append to a file
            self._folder = self._closing.enter_context(tempfile.TemporaryDirectory())
        else:
            self._folder = storage.local_path(self._url)
        # Of what earlier attempts wrote, steps from this one on are dropped by TensorBoard.
        first = run.step + 1 if run.step else 0
        self._writer = SummaryWriter(self._folder, purge_step=first)
        return {"url": self._url}

    def write_recipe(self, run: TrackedRun) -> None:
        """See `Tracker.write_recipe`."""
        self.write_facts({"run": run.url, "recipe": f"```toml\n{run.recipe}\n```"})

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.write_scalars`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        if time.monotonic() - self._uploaded > _UPLOAD_EVERY_SECONDS:
            self._upload()

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        if not storage.is_remote(self._url):
            return
        for name in storage.list_files(self._folder):
            data = storage.read_bytes(os.path.join(self._folder, name))
            storage.write_bytes(storage.join(self._url, name), data)

    def write_facts(self, facts: Mapping[str, str]) -> None:
        """See `Tracker.write_facts`."""
        for name, text in facts.items():
            self._writer.add_text(name, text)

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        """See `Tracker.write_picture`."""
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._writer.close()
        self._upload()
        self._closing.close()

    def abandon(self) -> None:
        """See `Tracker.abandon`."""


def check_wandb_key() -> None:
    """Check that W&B can log in, without a request and without asking the user.

    In a terminal W&B itself asks for a key, even in a thread, and waits for the answer.

    Raises:
        ConfigError: If it has no key and is not offline.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # read at its import; the logger reports for it
    mode = os.environ.get("WANDB_MODE")
    if mode in _WANDB_WITHOUT_KEY or any(os.environ.get(name) for name in _WANDB_KEYS):
        return
    import wandb
    from wandb.sdk import wandb_setup

    if wandb_setup.singleton().settings.mode in _WANDB_WITHOUT_KEY:  # of its files
        return
    if wandb.run is None and not wandb.login(prompt=False, verify=False):
        found = "W&B has no API key on this machine"
        advice = "set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"
        raise ConfigError("Tracker without an account", "track.wandb", found, advice)


class WeightsAndBiases:
    """A run of Weights & Biases; with WANDB_MODE=offline, files in wandb/ of a local run's folder.

    Args:
        track: The recipe's section.
    """

    module: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def __init__(self, track: TrackConfig) -> None:
        self._entity, _, self._project = track.wandb.rpartition("/")
        self._id = ""
        self._wandb: Any = None
        self._run: Any = None

    def open(self, run: TrackedRun) -> Reference:
        """See `Tracker.open`."""
        check_wandb_key()
        import wandb

        self._wandb = wandb
        place = {"entity": self._entity, "project": self._project}
        known = {name: run.reference.get(name) for name in place} == place
        self._id = self._id or (run.reference["id"] if known else secrets.token_hex(4))
        if self._run is None:
            try:
                self._run = self._start(run)
            except wandb.Error as error:
                if _DELETED_FROM_WANDB not in str(error):
                    raise
                log.warning("wandb: this run was deleted there, so another one is begun: %s", error)
                self._id = secrets.token_hex(4)
                self._run = self._start(run)
        url = "" if self._run.offline else self._run.url
        return {**place, "id": self._id, "url": url or ""}

    def _start(self, run: TrackedRun) -> Any:
        """Begin or continue the run of this id."""
        is_local = not storage.is_remote(run.url)
        if is_local:
            os.makedirs(storage.local_path(run.url), exist_ok=True)
        settings = {"console": "off", "silent": True, "disable_git": True, "save_code": False}
        return self._wandb.init(
            entity=self._entity or None,
            project=self._project,
            id=self._id,
            name=run.name,
            resume="allow",
            dir=storage.local_path(run.url) if is_local else None,  # None: WANDB_DIR decides
            reinit="create_new",
            settings=self._wandb.Settings(**settings),
        )

    def write_recipe(self, run: TrackedRun) -> None:
        """See `Tracker.write_recipe`."""
        # Steps of their own: W&B's may not return to an earlier one, as a resumed run does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.config.update({**run.sections, "url": run.url}, allow_val_change=True)

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.write_scalars`."""
        self._run.log({**values, "step": step})

    def write_facts(self, facts: Mapping[str, str]) -> None:
        """See `Tracker.write_facts`."""
        self._run.config.update({"facts": dict(facts)}, allow_val_change=True)

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        """See `Tracker.write_picture`."""
        from PIL import Image

        self._run.log({name: self._wandb.Image(Image.open(io.BytesIO(png))), "step": step})

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=int(failed))

    def abandon(self) -> None:
        """See `Tracker.abandon`; W&B waits for its own process when Python ends."""
        if self._wandb is None:
            return
        from wandb.sdk import wandb_setup

        session: Any = wandb_setup.singleton()
        connection, session._connection = session._connection, None  # the next run starts another
        if connection is not None:
            connection._cleanup()
            connection._proc._process.kill()
            connection._proc._process.wait()
            os.environ.pop("WANDB_SERVICE", None)  # its address, for children


def _metric_name(name: str) -> str:
    """Return a name as MLflow accepts it; a part of it may be any text, such as a source's name."""
    parts = (_NOT_IN_A_METRIC.sub("_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)[:_LONGEST_METRIC]


class MLflow:
    """A run on an MLflow server, or in a folder.

    Args:
        track: The recipe's section.
    """

    module: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def __init__(self, track: TrackConfig) -> None:
        self._uri, self._experiment = track.mlflow, track.mlflow_experiment
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        if track.mlflow_folder:  # MLflow refuses folders unless this is set
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client: Any = None
        self._id = ""
        self._accepts_files = True

    def open(self, run: TrackedRun) -> Reference:
        """See `Tracker.open`."""
        from mlflow.tracking import MlflowClient

        self._client = client = MlflowClient(self._uri)
        place = {"uri": self._uri, "experiment": self._experiment}
        if not self._id and {name: run.reference.get(name) for name in place} == place:
            self._id = self._existing(run.reference["id"])
        if not self._id:
            found = client.get_experiment_by_name(self._experiment)
            number = found.experiment_id if found else client.create_experiment(self._experiment)
            self._id = client.create_run(number, run_name=run.name).info.run_id
        client.update_run(self._id, status="RUNNING")
        return {**place, "id": self._id, "url": self._page()}

    def _existing(self, number: str) -> str:
        """Return the id of a run, "" with a warning if the run was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            if self._client.get_run(number).info.lifecycle_stage == "active":
                return number
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        log.warning("mlflow: run %s was deleted there, so another one is begun", number)
        return ""

    def _page(self) -> str:
        """Return the address of the run's page, "" if no server shows it."""
        if not self._uri.startswith("http"):
            return ""
        number = self._client.get_run(self._id).info.experiment_id
        return f"{self._uri.rstrip('/')}/#/experiments/{number}/runs/{self._id}"

    def write_recipe(self, run: TrackedRun) -> None:
        """See `Tracker.write_recipe`."""
        from mlflow.entities import Param

        self.write_facts({"url": run.url})
        self._write_file("config.toml", run.recipe.encode())
        # A parameter can be set once: a resumed run keeps the values of its first attempt.
        known = self._client.get_run(self._id).data.params
        texts = {name: text for name, text in run.parameters().items() if name not in known}
        rows = [Param(name, text[:_LONGEST_PARAMETER]) for name, text in texts.items()]
        for first in range(0, len(rows), _PARAMETERS_TOGETHER):
            batch = rows[first : first + _PARAMETERS_TOGETHER]
            self._client.log_batch(self._id, params=batch)

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.write_scalars`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        rows = [Metric(_metric_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=rows)

    def write_facts(self, facts: Mapping[str, str]) -> None:
        """See `Tracker.write_facts`."""
        for name, text in facts.items():
            self._client.set_tag(self._id, name, text)

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        """See `Tracker.write_picture`."""
        self._write_file(f"pictures/{name}-{step:06d}.png", png)

    def _write_file(self, name: str, data: bytes) -> None:
        """Store a file, which needs access to the server's store of files; metrics do not."""
        if not self._accepts_files:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, os.path.basename(name))
            storage.write_bytes(path, data)
            try:
                self._client.log_artifact(self._id, path, os.path.dirname(name) or None)
            except Exception as error:
                self._accepts_files = False
                log.warning("MLflow does not accept the files of this run: %s", error)

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")

    def abandon(self) -> None:
        """See `Tracker.abandon`."""


TRACKERS: dict[str, Callable[[TrackConfig], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
