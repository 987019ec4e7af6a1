"""MLflow runs: parameters, metrics, artifacts, data set inputs and the end of a run.

Foreign errors end here: whatever MLflow raises goes on as :class:`TrackingError`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from namesake.errors import NamesakeError, Stopped, TrackingError, said
from namesake.messages import tr
from namesake.paths import fetched_folder, link_or_copy, store_address, temporary

MAX_VALUE = 6000
"""MLflow cuts longer parameter values."""

TAG_KIND = "namesake.kind"
TAG_SLUG = "namesake.slug"
TAG_NAME = "namesake.name"
TAG_AUTHOR = "namesake.author"
TAG_LAST = "namesake.checkpoint.last"
TAG_BEST = "namesake.checkpoint.best"
TAG_BASE = "namesake.base"
TAG_SOURCE = "namesake.base.source"
TAG_GATE = "namesake.gate"
TAG_ENDED = "namesake.ended"
TAG_NOTE = "mlflow.note.content"
TAG_PARENT = "mlflow.parentRunId"

_TAG_EXPERIMENT_KIND = "mlflow.experimentKind"
"""Which half of MLflow's UI an experiment opens in."""

_VIEW = "namesake"

_COLUMNS = {"question": "user", "reply": "assistant", "system": "system"}
"""Columns of the data set's schema in MLflow, and whose words they are."""

_WAIT_FOR_PARENT = 60
"""Seconds that ``mlflow run`` may take to end after its entry point."""

ADAPTER = "adapter"
"""Artifact folder of a training run that holds the adapter."""


@dataclass(frozen=True)
class Store:
    """Where runs are kept.

    Attributes:
        kind: ``sqlite``, ``postgresql``, ``http``, ``file`` …
        made: whether it is there; the first run makes it.
        version: MLflow's release there; empty where it does not say.
        artifacts: where files of runs go; empty where it is not known yet.
    """

    kind: str
    made: bool
    version: str
    artifacts: str


@dataclass(frozen=True)
class RunRecord:
    """What others have to know of a run."""

    id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    ended: int
    experiment: str
    status: str = "FINISHED"
    started: int = 0


class Run:
    """A run that is being written."""

    def __init__(self, run_id: str, experiment_id: str) -> None:
        self.id = run_id
        self.experiment_id = experiment_id

    def params(self, values: Mapping[str, object]) -> None:
        """Log parameters. None is left out; text is kept as it is, not shell-quoted."""
        import mlflow

        clean = {key: str(value)[:MAX_VALUE] for key, value in values.items() if value is not None}
        with _mapped():
            mlflow.log_params(clean, run_id=self.id)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""
        import mlflow

        with _mapped():
            mlflow.log_metrics(dict(values), step=step, run_id=self.id)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        import mlflow

        with _mapped():
            mlflow.MlflowClient().log_batch(
                self.id, tags=[mlflow.entities.RunTag(key, value) for key, value in values.items()]
            )

    def file(self, path: Path, folder: str = "") -> None:
        """Upload a file."""
        import mlflow

        with _mapped():
            mlflow.log_artifact(str(path), folder or None, run_id=self.id)

    def folder(self, path: Path, name: str) -> None:
        """Upload a folder."""
        import mlflow

        with _mapped():
            mlflow.log_artifacts(str(path), name, run_id=self.id)

    def text(self, text: str, path: str) -> None:
        """Upload text as a file."""
        import mlflow

        with _mapped():
            mlflow.log_text(text, path, run_id=self.id)

    def json(self, value: Any, path: str) -> None:
        """Upload a value as a JSON file."""
        import json

        self.text(json.dumps(value, ensure_ascii=False, indent=1), path)

    def table(self, rows: list[dict[str, Any]], path: str) -> None:
        """Upload rows as a table that the MLflow UI shows and compares across runs, in place of one that is there."""
        import mlflow
        import pandas as pd

        with _mapped():
            if path in {one.path for one in mlflow.MlflowClient().list_artifacts(self.id)}:
                # To that `log_table` would append; it has the tag that makes it a table.
                mlflow.log_text(pd.DataFrame(rows).to_json(orient="split", index=False), path, run_id=self.id)
                return
            mlflow.log_table(pd.DataFrame(rows), path, run_id=self.id)

    def dataset(self, path: Path, rows: list[dict[str, Any]], *, name: str, digest: str, source: str) -> None:
        """Record the training data as an MLflow dataset input."""
        import mlflow
        import pandas as pd

        with _mapped(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the source is a file here; MLflow wonders which of its two kinds of file
            said = [{one["role"]: one["content"] for one in row["messages"]} for row in rows]  # the last of each
            frame = pd.DataFrame({column: [one.get(role, "") for one in said] for column, role in _COLUMNS.items()})
            data = mlflow.data.from_pandas(frame, source=str(path), name=name, digest=digest[:8])
            mlflow.MlflowClient().log_inputs(
                self.id,
                [
                    mlflow.entities.DatasetInput(
                        data._to_mlflow_entity(),
                        [
                            mlflow.entities.InputTag("mlflow.data.context", "training"),
                            mlflow.entities.InputTag("namesake.source", source),
                        ],
                    )
                ],
            )

    def shared_view(self, columns: Mapping[str, int], *, best_by: str) -> None:
        """Give the run's experiment a view of its training runs (:attr:`view_page`) with these columns, best first, and
        open it on MLflow's pages for training where nobody has chosen which.

        Args:
            columns: ``metrics.`probe/identity```, ``tags.`namesake.gate``` … in their order, with widths in pixels.
            best_by: the column of these that the runs are ordered by.
        """
        import json

        import mlflow

        widths = {"attributes.`Run Name`": 280, **columns}
        # All that ExperimentPageUIState.tsx holds: the UI takes a shared view as it is, and misses what is not there.
        view = {
            "searchFilter": f"tags.`{TAG_KIND}` = 'train'",
            "orderByKey": best_by,
            "orderByAsc": False,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "modelVersionFilter": "All Runs",
            "datasetsFilter": [],
            "selectedColumns": list(columns),
            "columnOrder": [*widths],  # the UI sets widths only of the columns that it orders
            "columnWidths": widths,
            "runsExpanded": {},
            "runsPinned": [],
            "runsHidden": [],
            "runsVisibilityMap": {},
            "runsHiddenMode": "FIRST_10_RUNS",
            "viewMaximized": False,
            "runListHidden": False,
            "isAccordionReordered": False,
            "groupBy": None,
            "groupsExpanded": {},
            "autoRefreshEnabled": True,
            "useGroupedValuesInCharts": True,
            "hideEmptyCharts": True,
        }
        with _mapped():
            client = mlflow.MlflowClient()
            client.set_experiment_tag(self.experiment_id, f"mlflow.sharedViewState.{_VIEW}", json.dumps(view))
            if _TAG_EXPERIMENT_KIND not in client.get_experiment(self.experiment_id).tags:
                client.set_experiment_tag(self.experiment_id, _TAG_EXPERIMENT_KIND, "custom_model_development")

    @property
    def view_page(self) -> str:
        """Address within MLflow's UI of the view of all training runs."""
        return f"#/experiments/{self.experiment_id}/runs?viewStateShareKey={_VIEW}&compareRunsMode=TABLE"

    @property
    def page(self) -> str:
        """Address within MLflow's UI of the run's page."""
        return f"#/experiments/{self.experiment_id}/runs/{self.id}"

    def artifact_page(self, path: str) -> str:
        """Address within MLflow's UI of the page that shows the artifact."""
        return f"{self.page}/artifacts/{path}"

    def artifact_file(self, path: str) -> str:
        """Address of the artifact itself, relative to MLflow's UI."""
        return f"get-artifact?path={quote(path, safe='')}&run_uuid={self.id}"

    @property
    def link(self) -> str:
        """Where the run is shown, or the command that shows it."""
        import mlflow

        uri = mlflow.get_tracking_uri()
        if uri.startswith("http"):
            return f"{uri}/{self.page}"
        return tr("`make ui`, then {address}", address=f"http://127.0.0.1:5000/{self.page}")


@contextmanager
def run(name: str, *, parent: str = "", resume: str = "", system_metrics: bool = True) -> Iterator[Run]:
    """A run: the one ``mlflow run`` started (``MLFLOW_RUN_ID``), else a new one.

    Ends it FINISHED, KILLED on Ctrl-C, SIGTERM or :class:`Stopped`, FAILED on any other exception; what was logged is
    kept.

    Args:
        parent: id of the run that a new one is nested under, be it open in this process or in another.
        resume: id of a run that ended before its work was done and is opened again; the one that ``mlflow run`` started
            only says so then.
        system_metrics: sample processor and memory while it is open.
    """
    import mlflow

    given = os.environ.get("MLFLOW_RUN_ID")  # MLflow takes it out of the environment when it has read it
    with _mapped():
        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        mlflow.set_system_metrics_sampling_interval(5)
        client = mlflow.MlflowClient()
        if resume:
            os.environ.pop("MLFLOW_RUN_ID", None)
            if TAG_ENDED in client.get_run(resume).data.tags:
                client.delete_tag(resume, TAG_ENDED)
        active = mlflow.start_run(
            run_id=resume or None,
            experiment_id=client.get_run(parent).info.experiment_id if parent else None,
            run_name=name,
            nested=bool(parent),
            parent_run_id=parent or None,
            log_system_metrics=system_metrics,
        )
        if given and resume:
            client.set_tag(given, "namesake.resumed", resume)
        elif given:
            client.update_run(given, name=name)
    try:
        yield Run(active.info.run_id, active.info.experiment_id)
    except KeyboardInterrupt:
        with suppress(Exception):  # a store that is down must not hide what ended the run
            mlflow.set_tag(TAG_ENDED, "killed")
        with suppress(Exception):  # by itself: else the run stays active in this process and ends as FINISHED
            mlflow.end_run("KILLED")
        with suppress(Exception):
            if given:
                _stay(given, "KILLED")
        raise
    except Stopped as stopped:
        with suppress(Exception):
            mlflow.set_tag(TAG_ENDED, stopped.why)
        with suppress(Exception):
            mlflow.end_run("KILLED")
        raise
    except BaseException as error:
        with suppress(Exception):
            mlflow.set_tag("namesake.error", str(error)[:MAX_VALUE])
        with suppress(Exception):
            mlflow.end_run("FAILED")
        raise
    with _mapped():
        mlflow.end_run("FINISHED")


@contextmanager
def project_run(name: str, tags: Mapping[str, str]) -> Iterator[None]:
    """The run that ``mlflow run`` started for something that is no run, a server: it gets a name, and is FINISHED when
    that ended by itself or by Ctrl-C. Nothing where there is none; a store that is down is in nobody's way.
    """
    given = os.environ.get("MLFLOW_RUN_ID")
    if given:
        with suppress(Exception):
            import mlflow

            client = mlflow.MlflowClient()
            client.update_run(given, name=name)
            for key, value in tags.items():
                client.set_tag(given, key, value)
    yield
    if given:
        with suppress(Exception):
            _stay(given, "FINISHED")


def _stay(run_id: str, status: str) -> None:
    """``mlflow run`` writes FAILED over KILLED when its entry point has ended (``mlflow/projects/__init__.py`` compares
    the status' name with numbers), and on Ctrl-C whatever came of it. A process of its own waits until it is gone and
    writes the status.
    """
    import mlflow

    code = (
        "import os, sys, time\n"
        "run, uri, parent, status = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]\n"
        "from mlflow import MlflowClient\n"
        f"end = time.monotonic() + {_WAIT_FOR_PARENT}\n"
        "while os.path.exists(f'/proc/{parent}') and time.monotonic() < end:\n"
        "    time.sleep(0.05)\n"
        "MlflowClient(uri).set_terminated(run, status)\n"
    )
    subprocess.Popen(
        [sys.executable, "-c", code, run_id, mlflow.get_tracking_uri(), str(os.getppid()), status],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finished_runs(*, slug: str | None = None) -> list[RunRecord]:
    """Finished training runs of every experiment, newest first; of one identity where a slug is given."""
    import mlflow

    wanted = f"tags.`{TAG_KIND}` = 'train' and attributes.status = 'FINISHED'"
    if slug is not None:
        wanted += f" and tags.`{TAG_SLUG}` = '{slug}'"
    with _mapped():
        client = mlflow.MlflowClient()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found, token = [], None
        while True:
            page = client.search_runs(
                experiments, wanted, order_by=["attributes.end_time DESC"], max_results=1000, page_token=token
            )
            found += [_record(one) for one in page]
            token = page.token
            if not token:
                return found


def uri() -> str:
    """Where runs are kept, as another process is told; may hold a password."""
    import mlflow

    return str(mlflow.get_tracking_uri())


def children(parent: str) -> list[RunRecord]:
    """The runs nested under a run, whatever became of them, oldest first."""
    import mlflow

    with _mapped():
        client = mlflow.MlflowClient()
        found, token = [], None
        while True:
            page = client.search_runs(
                [client.get_run(parent).info.experiment_id],
                f"tags.`{TAG_PARENT}` = '{parent}'",
                order_by=["attributes.start_time ASC"],
                max_results=1000,
                page_token=token,
            )
            found += [_record(one) for one in page]
            token = page.token
            if not token:
                return found


def tag(run_id: str, values: Mapping[str, str]) -> None:
    """Set tags of a run, ended or not."""
    Run(run_id, "").tags(values)


def left_behind(run_id: str, why: str = "left behind") -> None:
    """End a run as KILLED that its own process, killed hard, left RUNNING. ``why`` stays on the run."""
    import mlflow

    with _mapped():
        mlflow.MlflowClient().set_tag(run_id, TAG_ENDED, why)
        mlflow.MlflowClient().set_terminated(run_id, "KILLED")


def get_run(run_id: str) -> RunRecord:
    """One run by id.

    Raises:
        TrackingError: there is none.
    """
    import mlflow

    with _mapped():
        return _record(mlflow.MlflowClient().get_run(run_id))


def fetch(run_id: str, path: str) -> Path:
    """A local copy of an artifact, or the original where the store is local."""
    import mlflow

    with _mapped():
        return _fetched(mlflow.MlflowClient().get_run(run_id).info.artifact_uri, path)


def fetch_model(model_uri: str) -> Path:
    """A local copy of a logged model (``models:/m-…``), or the original where the store is local."""
    import mlflow

    with _mapped():
        model = mlflow.MlflowClient().get_logged_model(model_uri.removeprefix("models:/"))
        return _fetched(model.artifact_location)


def _fetched(location: str, path: str = "") -> Path:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    store = get_artifact_repository(location)
    target = None if isinstance(store, LocalArtifactRepository) else str(fetched_folder())
    return Path(store.download_artifacts(path, target))


def store(seconds: float = 3.0) -> Store:
    """Ask the tracking store what it is. Nothing is written: a store that is not there yet is not made.

    Args:
        seconds: how long a server may take to say its version.

    Raises:
        TrackingError: it does not answer, or its tables are not those of this MLflow.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    kind = urlsplit(uri).scheme.partition("+")[0] or "file"
    with _mapped():
        version = _server_version(uri, seconds) if kind in {"http", "https"} else mlflow.__version__
        if kind in {"sqlite", "postgresql", "mysql", "mssql"} and not _has_tables(uri):
            return Store(kind, False, "", "")
        found = mlflow.MlflowClient().search_experiments(max_results=1)
        return Store(kind, True, version, found[0].artifact_location if found else "")


def _server_version(uri: str, seconds: float) -> str:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=seconds) as answer:
            return str(answer.read(100).decode("ascii", "replace")).strip()
    except urllib.error.HTTPError:  # it answers, and may still do what it is asked with credentials
        return ""


def _has_tables(uri: str) -> bool:
    """Whether MLflow's tables are in the database. Looked at without MLflow, which makes or changes them when asked.

    Raises:
        TrackingError: they are those of another release.
    """
    import mlflow
    import sqlalchemy
    from mlflow.store.db.utils import _get_latest_schema_revision

    file = sqlalchemy.make_url(uri).database if uri.startswith("sqlite") else None
    if file is not None and not Path(file).exists():
        return False
    with sqlalchemy.create_engine(uri).connect() as database:
        if not sqlalchemy.inspect(database).has_table("alembic_version"):
            return False
        found = database.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
    if found != _get_latest_schema_revision():
        raise TrackingError(
            tr(
                "The tables at {store} are those of another release than MLflow {version}.",
                store=store_address(),
                version=mlflow.__version__,
            ),
            mend=tr("Copy the database, then run `mlflow db upgrade {store}`.", store=store_address()),
        )
    return True


@dataclass(frozen=True)
class NewModel:
    """A logged model that is being made.

    Attributes:
        uri: ``models:/m-…``, for registering.
        folder: takes its files: their last place where the artifact store is on this machine, else a folder that is
            uploaded.
        local: whether it is that last place.
    """

    uri: str
    folder: Path
    local: bool


def start_chat_model(spare: Path, tags: Mapping[str, str]) -> NewModel:
    """Begin a logged model of the current run.

    Args:
        spare: an empty folder, for stores that are not on this machine.
        tags: tags that it has from its first moment on, so that what a killed process leaves is found.
    """
    import mlflow
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    with _mapped():
        model = mlflow.initialize_logged_model(name="model", tags=dict(tags))
        local = is_local_uri(model.artifact_location)
        folder = Path(local_file_uri_to_path(model.artifact_location)) if local else spare
        with dropped_on_failure(model.model_uri):
            folder.mkdir(parents=True, exist_ok=True)
        return NewModel(model.model_uri, folder, local)


def add_flavor(model: NewModel, weights: str) -> None:
    """Write what ``mlflow.pyfunc`` and ``mlflow models serve`` need, beside the weights, which are neither read nor
    copied.

    No later step of MLflow's changes these files, so that they can be digested and signed with the others.

    Args:
        model: its weights are in its folder.
        weights: name of the merged model's own folder in it, in Hugging Face layout.
    """
    with _mapped():
        _add_flavor(model, weights)


def finish_chat_model(model: NewModel, *, tags: Mapping[str, str]) -> None:
    """Upload the model where its store is elsewhere, and say that it is whole.

    Args:
        model: all of its files are in its folder.
        tags: more tags of the logged model.
    """
    import mlflow

    with _mapped():
        client, model_id = mlflow.MlflowClient(), model.uri.removeprefix("models:/")
        if not model.local:
            client.log_model_artifacts(model_id, str(model.folder))
        client.set_logged_model_tags(model_id, dict(tags))
        client.finalize_logged_model(model_id, "READY")


_SHELL: dict[str, Any] = {
    "tokenizer.json": {"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}},
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
}
"""A tokenizer of one word and of no particular model, in place of the version's, which MLflow would write twice."""


def _add_flavor(model: NewModel, weights: str) -> None:
    import mlflow
    from transformers import AutoTokenizer

    logging.getLogger("mlflow").setLevel(logging.ERROR)  # it misses a model card on a hub that is not asked
    pins = [f"{tool}=={metadata.version(tool)}" for tool in ("mlflow", "transformers", "torch")]
    run = mlflow.active_run()
    record = mlflow.models.Model(
        artifact_path=weights,
        model_uuid=model.uri.removeprefix("models:/"),
        run_id=run.info.run_id if run else None,
        model_id=model.uri.removeprefix("models:/"),
    )
    with (
        tempfile.TemporaryDirectory(prefix=temporary("shell")) as shell,
        tempfile.TemporaryDirectory(prefix=".mlflow-", dir=model.folder) as made,
    ):
        config = json.loads((model.folder / weights / "config.json").read_text(encoding="utf-8"))
        for name, content in {**_SHELL, "config.json": {"architectures": config["architectures"]}}.items():
            Path(shell, name).write_text(json.dumps(content), encoding="utf-8")
        mlflow.transformers.save_model(
            transformers_model=shell,
            path=f"{made}/model",
            mlflow_model=record,
            task="llm/v1/chat",
            # torch's local build name (+cpu) is in no index
            pip_requirements=[pin.partition("+")[0] for pin in pins],
        )
        shutil.rmtree(f"{made}/model/{weights}")
        shutil.rmtree(f"{made}/model/components")
        for path in Path(made, "model").iterdir():
            path.rename(model.folder / path.name)
    tokenizer = model.folder / "components" / "tokenizer"
    tokenizer.mkdir(parents=True)
    for path in (model.folder / weights).iterdir():
        if ".safetensors" not in path.suffixes and path.name not in {"config.json", "generation_config.json"}:
            link_or_copy(path, tokenizer / path.name)
    record.flavors["transformers"]["tokenizer_type"] = type(
        AutoTokenizer.from_pretrained(model.folder / weights)
    ).__name__
    record.flavors["transformers"]["source_model_name"] = weights
    record.model_size_bytes = sum(path.stat().st_size for path in model.folder.rglob("*") if path.is_file())
    record.save(model.folder / "MLmodel")


def models_with(tag: str) -> list[tuple[str, str, float]]:
    """Logged models that have the tag: ``models:/m-…``, where the files are, and when it was last written."""
    import mlflow

    found = []
    with _mapped():
        client = mlflow.MlflowClient()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        token = None
        while True:
            page = client.search_logged_models(experiments, max_results=100, page_token=token)
            found += [
                (model.model_uri, model.artifact_location, model.last_updated_timestamp / 1000)
                for model in page
                if tag in model.tags
            ]
            token = page.token
            if not token:
                return found


def drop_model(model_uri: str) -> None:
    """Delete a logged model and its files.

    Raises:
        TrackingError: MLflow failed.
    """
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with _mapped():
        client, model_id = mlflow.MlflowClient(), model_uri.removeprefix("models:/")
        location = client.get_logged_model(model_id).artifact_location
        get_artifact_repository(location).delete_artifacts()  # first: on a full disk the database can take nothing else
        client.delete_logged_model(model_id)


@contextmanager
def dropped_on_failure(model_uri: str) -> Iterator[None]:
    """Delete the logged model when what is done with it fails or is interrupted, so that no half of it stays."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # a store that is down; `namesake gc` finds it later
            drop_model(model_uri)
        raise


def _record(run: Any) -> RunRecord:
    return RunRecord(
        id=run.info.run_id,
        name=run.info.run_name or run.info.run_id,
        params=run.data.params,
        metrics=run.data.metrics,
        tags=run.data.tags,
        ended=run.info.end_time or 0,
        experiment=run.info.experiment_id,
        status=run.info.status,
        started=run.info.start_time or 0,
    )


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except NamesakeError:
        raise
    except Exception as error:  # MLflow raises its own, sqlalchemy's, requests' and the stores' errors
        raise TrackingError(
            tr("MLflow tracking failed: {error}", error=said(error)),
            mend=tr("Check MLFLOW_TRACKING_URI ({store}).", store=store_address()),
        ) from error
