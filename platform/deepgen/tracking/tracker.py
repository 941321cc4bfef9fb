"""Records a run: metrics, pictures and files go to the run folder first, and to MLflow in the background.

Left out on purpose: MLflow's global "active run" (two trackers in one process would mix), its own asynchronous queue
(it logs out of order, gives up for good on the first error and can delay the exit by minutes) and its telemetry.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import yaml
from PIL import Image

from deepgen.config.schema.paths import CHECKOUT
from deepgen.config.settings import shown_settings
from deepgen.errors import UserError, disk_error, writing
from deepgen.masking import masked, masked_value
from deepgen.tracking.delivery.run_items import (
    AboutItem,
    EndItem,
    ExperimentTagItem,
    FileItem,
    ImageItem,
    LaterItem,
    MetricsItem,
    TagItem,
)
from deepgen.tracking.delivery.sender import MAX_BATCH, Item, Sender, SenderCounts, first_line
from deepgen.tracking.journal import FILE_NAME, Entry, Journal, make_entry, read_entries
from deepgen.tracking.mlflow_page import (
    EXPERIMENT_TAGS,
    Names,
    changed_settings,
    default_settings,
    flatten,
    page_address,
    storable,
)
from deepgen.tracking.provenance import attempt_tags, git_diff, run_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, RunData

    from deepgen.config.settings import Settings

logger = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id"
SETTINGS_FILE = "settings.yaml"  # all settings of the newest start, as a recipe
NAMES_FILE = "mlflow_names.json"  # names that MLflow has cut, with their originals
START_DEADLINE_S = 60.0
CLOSE_DEADLINE_S = 60.0
_MAX_PARAM_LENGTH = 6000
_REACH_DEADLINE_S = 10.0
_LOCAL_SERVER = "http://127.0.0.1:5000"  # of `mlflow ui`
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
# Errors in the content, not in the connection: sending the same thing again cannot help.
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"})
_Result = TypeVar("_Result")


class NoAnswerError(UserError):
    """The server cannot be reached, or does not answer in time."""


class Tracker:
    """Records a run under `<settings.run.dir>/<settings.run.name>/` and in MLflow.

    Use it as a context manager, or call `start()` and `close()`. MLflow's data go to `settings.tracking.uri`, else to
    MLFLOW_TRACKING_URI from the environment, else to `sqlite:///<run.dir>/mlflow.db` with artifacts in
    `<run.dir>/mlartifacts`. With `settings.run.resume`, the run whose id is in `<run folder>/mlflow_run_id` continues.

    If two processes of one program record a run (the driver its evaluation, the learner its steps), the later one
    passes `attach` and continues the run that the first one began. `log`, `log_images` and `log_file` never raise
    because of tracking and never wait for a server; problems are counted (`counts`) and warned about.
    """

    def __init__(
        self, settings: Settings, stage: str, *, attach: bool = False, start_deadline_s: float = START_DEADLINE_S
    ) -> None:
        self.folder = settings.run.folder.resolve()
        self.uri = tracking_uri(settings)
        self.run_id = ""
        self.experiment_id = ""
        self.skipped_values = 0  # metrics that had no finite value
        self.journal_failures = 0  # lines of metrics.jsonl that could not be written at once
        self._settings, self._stage, self._start_deadline_s = settings, stage, start_deadline_s
        self._attached, self._goes_on = attach, attach or settings.run.resume
        self._client: MlflowClient | None = None
        self._journal: Journal | None = None
        self._sender: Sender | None = None
        self._params, self._metrics, self._tags = Names(), Names(), Names()
        self._pictures = Names(ascii_only=True)
        self._cut: dict[str, str] = {}  # what NAMES_FILE has

    def start(self) -> Tracker:
        """Open the journal and begin or continue the MLflow run.

        Raises UserError if the run folder cannot be written, or the tracking server does not answer in time; but a run
        that it knows goes on, and the server hears of it later.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "images").mkdir(exist_ok=True)
            self._journal = Journal(self.folder, resume=self._goes_on)
            if not self._attached:
                _write_atomically(self.folder / SETTINGS_FILE, _as_recipe(self._settings))
            _quiet_mlflow()
            about, history = self._open_in_time()
        except OSError as error:
            raise UserError(f"run.dir: cannot write the run folder {self.folder}: {error.strerror or error}") from error
        hint = f"Every number is kept in {self._journal.path}."
        self._sender = Sender(_is_refusal, hint)
        for item in about:
            self._put(item)
        self._note_cut_names()
        for entry in history:
            self._send_entry(entry)
        return self

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers of optimizer step `step`. Values: float-like (Python, numpy, torch scalar) or None.

        None, NaN and infinite values are left out and counted, never written as 0.
        """
        entry = make_entry(step, time.time(), metrics)
        self.skipped_values += len(entry.skipped)
        self._write(entry)
        self._send_entry(entry)

    def log_images(self, key: str, step: int, image: Image.Image | np.ndarray) -> None:
        """Record a picture of step `step` (PIL, or uint8 [H, W, 3]). MLflow shows the pictures of one `key` by step.

        A copy goes to `<run folder>/images/<key>-<step>.png`.
        """
        name = self._pictures(key)
        picture = Image.fromarray(image.copy()) if isinstance(image, np.ndarray) else image.copy()
        path = self.folder / "images" / f"{name.replace('/', '_')}-{step:06d}.png"
        self._put(ImageItem(self._mlflow, self.run_id, name, int(step), _milliseconds(time.time()), path, picture))

    def tag(self, key: str, value: str) -> None:
        """Set a tag of the MLflow run, or replace it."""
        self._put(TagItem(self._mlflow, self.run_id, self._tags(key), _shown_value(key, value)))
        self._note_cut_names()

    def log_file(self, path: Path) -> None:
        """Attach a finished file (table, picture, plot) to the MLflow run."""
        self._put(FileItem(self._mlflow, self.run_id, Path(path)))

    def counts(self) -> SenderCounts:
        """Failed attempts, refused records, and records that still wait for the server."""
        return self._sender.counts() if self._sender else SenderCounts()

    def flush(self, deadline_s: float = CLOSE_DEADLINE_S) -> bool:
        """Wait until the server has everything. False if `deadline_s` passes first."""
        return self._sender.flush(deadline_s) if self._sender else True

    def close(self, status: str = "FINISHED", *, deadline_s: float = CLOSE_DEADLINE_S) -> None:
        """Deliver waiting records and end the MLflow run as FINISHED, FAILED or KILLED. A second call does nothing.

        Raises UserError if numbers are lost because metrics.jsonl could not be written to the end, but not for a run
        that has failed otherwise.
        """
        if self._sender is None:
            return
        lost = self._close_journal()
        self._sender.put(EndItem(self._mlflow, self.run_id, "FAILED" if lost else status))
        sender, self._sender = self._sender, None
        undelivered = sender.close(deadline_s)
        if undelivered:
            error = sender.counts().last_error or f"not within {deadline_s:.0f} s"
            kept = "Numbers were lost, see below" if lost else f"Every number is kept in {self.folder / FILE_NAME}"
            message = "TRACKING: %d records did not reach %s (%s). %s."
            logger.warning(message, undelivered, masked(self.uri), error, kept)
        if lost and status == "FINISHED":
            raise lost
        if lost:
            logger.warning("TRACKING: %s", lost)

    def _close_journal(self) -> UserError | None:
        """What is lost of the numbers, if anything is."""
        try:
            if self._journal is not None:
                with writing("the numbers", self._journal.path):
                    self._journal.close()
        except UserError as error:
            return error
        return None

    def where(self) -> str:
        """One line that tells a person how to open the page of the run and those beside it."""
        page = page_address(self.experiment_id, self._stage) if self.experiment_id else ""  # no answer yet
        if self.uri.startswith("sqlite:"):
            here = CHECKOUT is not None and self.uri == f"sqlite:///{CHECKOUT / 'runs' / 'mlflow.db'}"
            server = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", masked(self.uri)])
            serve = f"{'make ui   or: ' if here else ''}{server}"
            return f"{serve}   then: {_LOCAL_SERVER}/{page}"
        return f"{masked(self.uri).rstrip('/')}/{page}"

    def __enter__(self) -> Tracker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED")

    # --- MLflow run -------------------------------------------------------------------------------------------------

    def _mlflow(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient  # takes 1.3 s, so only where a run is recorded

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def _open_in_time(self) -> tuple[list[Item], list[Entry]]:
        """As `_open_run`, or what to do once the server answers, if the run has begun there before."""
        try:
            return _call_with_deadline(
                self._open_run, self._start_deadline_s, _uri_key(self._settings), masked(self.uri)
            )
        except NoAnswerError as error:
            known = self._known_run()
            if not known:
                raise
            logger.warning("TRACKING: %s. The run goes on; what is to be sent waits for the server", error)
            self.run_id = known
            return [LaterItem(lambda: self._continued(known))], []

    def _known_run(self) -> str:
        """The id of the MLflow run that continues; "" if a new one begins."""
        id_file = self.folder / RUN_ID_FILE
        return id_file.read_text(encoding="utf-8").strip() if self._goes_on and id_file.exists() else ""

    def _continued(self, known: str) -> list[Item]:
        """Take up a run that MLflow has. Returns what to send about it."""
        client = self._mlflow()
        client.update_run(known, status="RUNNING")
        run = client.get_run(known)
        self.experiment_id, there = str(run.info.experiment_id), run.data
        self._params, self._metrics, self._tags = map(Names, (there.params, there.metrics, there.tags))
        return [] if self._attached else self._about(there)  # attached: the first process has said it all

    def _open_run(self) -> tuple[list[Item], list[Entry]]:
        """Find or create experiment and run. Returns what to send about them, and entries that a new run lacks."""
        client = self._mlflow()
        experiment = self._experiment()
        self.experiment_id = str(experiment.experiment_id)
        about: list[Item] = [
            ExperimentTagItem(self._mlflow, self.experiment_id, key, value)
            for key, value in EXPERIMENT_TAGS.items()
            if experiment.tags.get(key) != value
        ]
        known = self._known_run()
        if known and _run_exists(client, known):
            self.run_id = known
            return ([] if self._attached else about) + self._continued(known), []
        if known:
            message = "the MLflow run %s is not at %s: a new run takes over the history from metrics.jsonl"
            logger.warning(message, known, masked(self.uri))
        run = client.create_run(self.experiment_id, run_name=self._settings.run.name)
        self.run_id = run.info.run_id
        _write_atomically(self.folder / RUN_ID_FILE, self.run_id + "\n")
        history = list(read_entries(self.folder / "metrics.jsonl")) if self._goes_on else []
        return [*about, *self._about(None)], history

    def _experiment(self) -> Experiment:
        from mlflow.exceptions import MlflowException

        client, name = self._mlflow(), self._settings.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return client.get_experiment(client.create_experiment(name, artifact_location=self._artifacts()))
            except MlflowException:  # another run may just have made it
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise UserError(f"tracking.experiment: {name!r} was deleted in MLflow; restore it or give another name")
        return experiment

    def _artifacts(self) -> str | None:
        """Folder for pictures, beside the sqlite file; None with a server, which decides itself."""
        if not self.uri.startswith("sqlite:"):
            return None
        return (Path(self._settings.run.dir).resolve() / "mlartifacts").as_uri()

    def _about(self, before: RunData | None) -> list[Item]:
        """What the page tells of the run: provenance as tags, settings that are not the default, all of them as a file.

        A continued run keeps what it had `before`: MLflow does not let parameters change. A setting that differs now
        becomes a tag `resumed.<key>`, and provenance that differs one of this attempt (`attempt_tags`).
        """
        tags, params = run_tags(self._stage), changed_settings(self._settings)
        if before is None:
            tags["attempts"] = "1"
        else:
            tags, params = attempt_tags(tags, before.tags), {}
            usual = flatten(default_settings(self._settings))
            for key, value in flatten(self._settings.model_dump()).items():
                then = before.params.get(self._params(key), usual.get(key))
                if key != "run.resume" and then != _shown_value(key, value):
                    tags[f"resumed.{key}"] = value
        # Apart, so that a server that refuses one takes the other.
        parts: list[tuple[dict[str, str], dict[str, str]]] = [
            (_shown(self._tags, tags), {}),
            ({}, _shown(self._params, params)),
        ]
        return [
            *(AboutItem(self._mlflow, self.run_id, *part) for part in parts),
            *(FileItem(self._mlflow, self.run_id, path) for path in self._about_files(int(tags["attempts"]))),
        ]

    def _about_files(self, attempt: int) -> list[Path]:
        settings = self.folder / SETTINGS_FILE
        patch = self.folder / ("git-diff.patch" if attempt == 1 else f"git-diff.{attempt}.patch")
        if difference := git_diff():
            _write_atomically(patch, difference)
            return [settings, patch]
        patch.unlink(missing_ok=True)  # of an older run
        return [settings]

    def _note_cut_names(self) -> None:
        """Write and send NAMES_FILE if MLflow has got a new name that cannot be read back."""
        cut = self._params.cut | self._metrics.cut | self._tags.cut | self._pictures.cut
        if cut.keys() <= self._cut.keys():
            return
        self._cut |= cut
        path = self.folder / NAMES_FILE
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if self._goes_on and path.exists() else {}
            _write_atomically(path, json.dumps({**known, **self._cut}, indent=1))
        except (OSError, ValueError, TypeError) as error:  # no reason to stop: metrics.jsonl has all names, too
            logger.warning("TRACKING: cannot write %s: %s", path, error)
            return
        self._put(FileItem(self._mlflow, self.run_id, path))

    # --- delivery ---------------------------------------------------------------------------------------------------

    def _write(self, entry: Entry) -> None:
        if self._journal is None:
            raise RuntimeError("Tracker.log before start()")
        try:
            self._journal.append(entry)
        except (OSError, ValueError) as error:  # disk full (then it keeps them for the next try), or closed
            self.journal_failures += 1
            if self.journal_failures == 1:
                logger.warning("TRACKING: cannot write %s: %s", self._journal.path, error)

    def _send_entry(self, entry: Entry) -> None:
        if not entry.metrics:
            return
        from mlflow.entities import Metric

        at = _milliseconds(entry.time)
        metrics = [Metric(self._metrics(key), value, at, entry.step) for key, value in entry.metrics.items()]
        self._note_cut_names()
        for start in range(0, len(metrics), MAX_BATCH):
            self._put(MetricsItem(self._mlflow, self.run_id, metrics[start : start + MAX_BATCH]))

    def _put(self, item: Item) -> None:
        if self._sender is None:
            raise RuntimeError("Tracker is not open: call start() before logging, and nothing after close()")
        self._sender.put(item)


def tracking_uri(settings: Settings) -> str:
    """The MLflow address in use: from the setting, the environment, or a sqlite file (absolute path) in `run.dir`."""
    given = settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return given or f"sqlite:///{Path(settings.run.dir).resolve() / 'mlflow.db'}"


def check_tracking(settings: Settings) -> None:
    """Raise UserError if MLflow does not know the kind of address or no server answers. For use before the start."""
    uri, key = tracking_uri(settings), _uri_key(settings)
    parts = urlsplit(uri)
    if parts.scheme.partition("+")[0] not in _SCHEMES:
        raise UserError(f"{key}: got {masked(uri)!r}; allowed: an address that begins with {', '.join(_SCHEMES)}")
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=_REACH_DEADLINE_S).close()
    except (OSError, ValueError) as error:
        # A ValueError is about the port, and could show a part of a password.
        reason = "no valid port" if isinstance(error, ValueError) else error.strerror or str(error)
        raise UserError(
            f"{key}: no answer from {masked(uri)} ({reason}); allowed: a server that runs, or none for a file"
        ) from error


def _uri_key(settings: Settings) -> str:
    """Name of the setting or variable that the address comes from."""
    given = settings.tracking.uri or not os.environ.get("MLFLOW_TRACKING_URI")
    return "tracking.uri" if given else "MLFLOW_TRACKING_URI"


# --- helpers --------------------------------------------------------------------------------------------------------


def _call_with_deadline(function: Callable[[], _Result], deadline_s: float, key: str, server: str) -> _Result:
    """Run `function` in a daemon thread, so that a server that accepts but never answers cannot block the program.

    key: the setting with the server's address. Raises UserError with one line.
    """
    result: list[_Result] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            result.append(function())
        except Exception as error:  # noqa: BLE001  carried to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="tracking-start", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if result:
        return result[0]
    instead = "give a reachable server, or leave it empty for a file"
    if not errors:
        raise NoAnswerError(f"{key}: no answer from {server} within {deadline_s:.0f} s; {instead}")
    if isinstance(errors[0], UserError):
        raise errors[0]
    if isinstance(errors[0], OSError) and (disk_error(errors[0]) or errors[0].filename):
        raise errors[0]  # not of the server, but of the run's folder
    reason = first_line(errors[0])[:200]
    if _is_refusal(errors[0]):
        raise UserError(f"{key}: {server} refuses the run: {reason}") from errors[0]
    if server.startswith("sqlite:"):
        file, then = server.partition("///")[2], "make room or let it be written, or give another address"
        raise UserError(f"{key}: cannot read or write {file}: {reason}; {then}") from errors[0]
    raise NoAnswerError(f"{key}: no answer from {server}: {reason}; {instead}") from errors[0]


def _quiet_mlflow() -> None:
    """Turn off MLflow's telemetry and migration log, and shorten its timeouts.

    With MLflow's default timeouts, an unreachable server would hold up the program for minutes.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # `Tracker.where` has it, to our view
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow  # noqa: F401  its import sets the log levels that are lowered here

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):  # too wordy; the sender reports failures
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _run_exists(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _is_refusal(error: Exception) -> bool:
    return getattr(error, "error_code", "") in _REFUSALS or isinstance(error, ValueError | FileNotFoundError)


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _shown(names: Names, values: Mapping[str, str]) -> dict[str, str]:
    """Settings or tags with names and values that MLflow takes."""
    return {names(key): _shown_value(key, value) for key, value in values.items()}


def _shown_value(key: str, value: str) -> str:
    """A value without secrets, cut to what MLflow takes."""
    return storable(str(masked_value(key, value)))[:_MAX_PARAM_LENGTH]


def _as_recipe(settings: Settings) -> str:
    """All settings as a recipe, without secrets."""
    content = shown_settings(settings)
    del content["run"]["resume"]  # how a run was started, not what it is
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False)


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
