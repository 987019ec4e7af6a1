"""MLflow's model registry: versions and aliases.

Foreign errors end here: whatever MLflow raises goes on as :class:`RegistryError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import tenacity

from namesake.errors import InputError, NamesakeError, RegistryError, said
from namesake.messages import tr
from namesake.paths import fetched_folder, store_address

CHAMPION = "champion"
"""The alias that is served."""

TAG_RUN = "namesake.run"
TAG_IDENTITY = "namesake.identity"
TAG_MODEL = "namesake.model"
"""The registered model that a version was made for; MLflow's copies of it into other ones have its tags, too."""

TAG_KEY = "namesake.promotion_key"
TAG_QUESTIONS = "namesake.questions"
"""Digest of the questions that a version's scores are about; others cannot be compared with it."""

TAG_OVERRIDE = "namesake.override"
"""The reason that somebody gave for pointing an alias at a version which did not pass the gate."""

TAG_SERVING_ERROR = "namesake.serving_error"
"""Tag of a version that was not served, with the reason; taken away when it is."""

SCORE = "score."
"""What the tags with a version's scores begin with."""

SHOWN_SCORES = ("identity", "swapped", "leak", "plain")
"""Those that people are shown first."""

BY_HAND = "by hand"
"""How an alias moved that neither `promote` nor `rollback` moved."""

_HISTORY = "namesake.history."
"""What the tags of a registered model begin with that hold a move of an alias each, for ever."""

RECENT = "namesake.recent."
"""What the tag begins with that holds an alias's last moves, on the version that it was moved to."""

_LONGEST_WHY = 2000
"""Characters of a reason that are kept: a registered model's tag has 5,000 in MLflow's database."""

_KEPT = 10
"""How many moves that tag holds."""

_ABOUT = (
    f"`namesake serve` answers with the version that the alias `{CHAMPION}` points to. Move it, here or with "
    "`namesake rollback`: servers follow without a restart, once the version has proved itself. `namesake history` "
    "tells who moved it, when and why."
)

_CONFLICTS = ("IntegrityError", "UniqueViolation", "0 were matched", "Model Version creation error")
"""What MLflow's errors say where two writers met: sqlalchemy's, psycopg's, again sqlalchemy's, its own word."""

_AGAIN = "Check that MLFLOW_TRACKING_URI answers, then run the same again: what is done already is not done twice."

T = TypeVar("T")

_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    number: int
    run_id: str
    source: str
    status: str
    tags: Mapping[str, str]
    created: int

    @property
    def uri(self) -> str:
        """``models:/ccb/3``"""
        return f"models:/{self.name}/{self.number}"

    @property
    def scores(self) -> dict[str, float]:
        """What its tags state of its scores; empty where somebody else made it."""
        found = {}
        for key, value in self.tags.items():
            if key.startswith(SCORE):
                with suppress(ValueError):  # a tag that somebody wrote by hand
                    found[key.removeprefix(SCORE)] = float(value)
        return found


@dataclass(frozen=True)
class Model:
    """A registered model of ours: the identity it stands for, and the version's number of each alias."""

    name: str
    identity: str
    aliases: Mapping[str, int]


@dataclass(frozen=True)
class Move:
    """One move of an alias.

    Attributes:
        time: seconds since 1970.
        before, to: version numbers; none where it pointed nowhere.
        who: the user, as far as known.
        how: ``promote``, ``rollback`` or ``by hand``.
        why: reason, or the gate's verdict.
        key: the tag that holds it; empty before it is written.
        scores: those of the version that it went to, as fractions; empty where nobody wrote them down.
    """

    time: float
    alias: str
    before: int | None
    to: int | None
    who: str
    how: str
    why: str = ""
    key: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)


def told_scores(scores: Mapping[str, float], form: str = ".1%") -> list[str]:
    """Those of them that people are shown first, in their order: ``identity 98.4%``."""
    return [f"{key} {scores[key]:{form}}" for key in SHOWN_SCORES if key in scores]


def resolve(uri: str) -> Version:
    """The version that ``models:/ccb@champion`` or ``models:/ccb/3`` names.

    Raises:
        InputError: the text is no such reference.
        RegistryError: there is no such model, version or alias.
    """
    match = _URI.match(uri)
    if match is None:
        raise InputError(
            "model", uri, "is no reference to a model version", mend="Write models:/NAME@ALIAS or models:/NAME/VERSION."
        )
    name, alias, version = match["name"], match["alias"], match["version"]
    with _mapped(
        tr("There is no {uri}.", uri=uri),
        mend=tr("`namesake promote` makes versions of {name}; `make ui` shows what there is.", name=name),
    ):
        client = _client()
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
        return _version(found)


def alias_in(uri: str) -> str:
    """The alias of ``models:/ccb@champion``; empty where the reference names a version."""
    return uri.rpartition("@")[2] if "@" in uri else ""


def models() -> list[Model]:
    """The registered models of ours, the one promoted to last first."""
    with _mapped("The model registry cannot be read."):
        found = [
            (
                max(
                    (int(v.last_updated_timestamp) for v in model.latest_versions), default=model.last_updated_timestamp
                ),
                model.name,
                Model(model.name, model.tags[TAG_IDENTITY], {k: int(v) for k, v in model.aliases.items()}),
            )
            for model in _client().search_registered_models(max_results=1000)
            if TAG_IDENTITY in model.tags
        ]
    return [model for *_, model in sorted(found, key=lambda one: one[:2], reverse=True)]


def name_in(text: str) -> str:
    """The registered model's name in ``ccb``, ``models:/ccb``, ``models:/ccb@champion`` or ``models:/ccb/3``."""
    return text.removeprefix("models:/").partition("@")[0].partition("/")[0]


def named_or_newest(text: str) -> str:
    """The registered model that the text names, or else the one that was promoted to last.

    Raises:
        RegistryError: there is none.
    """
    found = name_in(text) or newest_model()
    if not found:
        raise RegistryError("Nothing has been promoted yet.", mend="Run `namesake promote`.")
    return found


def newest_model() -> str | None:
    """Name of the registered model of ours that was promoted to last."""
    return next((model.name for model in models()), None)


def newest_versions(name: str, most: int) -> list[Version]:
    """The last versions of a registered model, newest first."""
    with _mapped(tr("The versions of {name} cannot be read.", name=name)):
        found = _client().search_model_versions(f"name = '{name}'", max_results=most, order_by=["version_number DESC"])
        return [_version(one) for one in found]


def identity_of(name: str) -> str | None:
    """The identity that a registered model stands for; none where the model does not exist.

    Its newest version says so, too; one that does not (an older release made it, or somebody else) has the registered
    model itself asked.
    """
    import mlflow

    newest = newest_versions(name, 1)
    if newest and newest[0].tags.get(TAG_MODEL) == name and TAG_IDENTITY in newest[0].tags:
        return newest[0].tags[TAG_IDENTITY]
    try:
        tags: Mapping[str, str] = _client().get_registered_model(name).tags
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise RegistryError(tr("The model registry cannot be read: {error}.", error=error)) from error
    return tags.get(TAG_IDENTITY, "")


def check_owner(name: str, owner: str | None, identity: str, refused: Callable[..., NamesakeError]) -> None:
    """Raise ``refused`` where the registered model is there and stands for another identity."""
    if owner not in (None, identity):
        raise refused(
            tr(
                "The registered model {name} stands for {owner}, not for {identity}.",
                name=name,
                owner=owner or "something that is not ours",
                identity=identity,
            ),
            mend="Give another one: --model-name NAME.",
        )


def register(
    name: str, model_uri: str, *, run_id: str, identity: str, tags: Mapping[str, str], description: str
) -> Version:
    """Register a logged model as the next version; the registered model is made where it is missing.

    Raises:
        RegistryError: MLflow failed, or somebody has made the registered model for another identity meanwhile.
    """
    import mlflow

    with _mapped(tr("{model_uri} could not be registered as {name}.", model_uri=model_uri, name=name)):
        client = _client()
        owner = identity_of(name)
        if owner is None:
            try:
                about = f"{identity}. {_ABOUT}"
                _write(client.create_registered_model, name, tags={TAG_IDENTITY: identity}, description=about)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                owner = identity_of(name)  # somebody was faster
        check_owner(name, owner, identity, RegistryError)
        source = client.get_logged_model(model_uri.removeprefix("models:/")).artifact_location
        try:
            made = _write(
                client.create_model_version,
                name,
                source=source,
                run_id=run_id,
                tags={**tags, TAG_RUN: run_id, TAG_IDENTITY: identity, TAG_MODEL: name},
                description=description,
                model_id=model_uri.removeprefix("models:/"),
            )
        except BaseException:
            with suppress(Exception):  # it may be there, and only the answer was lost
                for found in client.search_model_versions(f"name = '{name}' and source_path = '{source}'"):
                    client.delete_model_version(name, found.version)
            raise
        return _version(made)


def point(name: str, alias: str, number: int) -> None:
    """Move the alias to the version."""
    with _mapped(
        tr("The alias {alias} of {name} could not be moved to version {number}.", alias=alias, name=name, number=number)
    ):
        _write(_client().set_registered_model_alias, name, alias, str(number))


def delete(version: Version) -> None:
    """Take the version out of the registry; its logged model stays."""
    with _mapped(tr("{uri} could not be deleted.", uri=version.uri)):
        _client().delete_model_version(version.name, str(version.number))


def tag(version: Version, key: str, value: str | None) -> None:
    """Set a tag of the version; none takes it away."""
    with _mapped(tr("The tag {key} of {uri} could not be set.", key=key, uri=version.uri)):
        client = _client()
        if value is not None:
            _write(client.set_model_version_tag, version.name, str(version.number), key, value)
        elif key in client.get_model_version(version.name, str(version.number)).tags:
            client.delete_model_version_tag(version.name, str(version.number), key)


def add_webhook(url: str, secret: str) -> str:
    """Have the MLflow server call the address when an alias moves; the webhook's id.

    One that is there for the address already (a server that was killed left it) is replaced.

    Raises:
        RegistryError: there is no MLflow server, or it does not take the address.
    """
    # It reads its webhooks once in MLFLOW_WEBHOOK_CACHE_TTL (60 s): the first moves after a start may come by polling.
    mend = tr(
        "MLflow calls https addresses of public hosts, others where MLFLOW_WEBHOOK_ALLOWED_SCHEMES and "
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS say so, and keeps secrets by MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY."
    )
    import mlflow

    if not mlflow.get_registry_uri().startswith("http"):
        raise RegistryError("Only an MLflow server sends webhooks; MLFLOW_TRACKING_URI names none.", mend=mend)
    with _mapped(tr("MLflow does not take the webhook {url}.", url=url), mend=mend):
        client = _client()
        page = client.list_webhooks(max_results=1000)
        while True:
            for webhook in page:
                if webhook.url == url:
                    client.delete_webhook(webhook.webhook_id)
            if not page.token:
                break
            page = client.list_webhooks(max_results=1000, page_token=page.token)
        events = ["model_version_alias.created", "model_version_alias.deleted"]
        return str(client.create_webhook("namesake", url, events, secret=secret).webhook_id)


def remove_webhook(webhook_id: str) -> None:
    """Take back what :func:`add_webhook` asked for."""
    with _mapped("The webhook could not be taken back."):
        _client().delete_webhook(webhook_id)


def record_move(name: str, move: Move) -> None:
    """Keep a move of an alias: MLflow has no history of aliases.

    It goes into a tag of the registered model, and then, with the moves before it, onto the version that the alias was
    moved to, from where :func:`recent` reads it however many versions there are. The first tag's key is made from the
    move and the one before it, so that several servers that see one move by hand write one entry.
    """
    move = replace(move, why=move.why[:_LONGEST_WHY])
    with _mapped(tr("The history of {name} could not be written.", name=name)):
        client, found = _client(), _recent(name, move.alias)
        last = found.moves[-1:]
        if move.how == BY_HAND and last and (last[0].before, last[0].to) == (move.before, move.to):
            return  # whoever made it has written it down
        seen = [BY_HAND] if move.how == BY_HAND else []
        text = json.dumps([[one.key for one in last], move.alias, move.before, move.to, *seen])
        move = replace(move, key=f"{_HISTORY}{hashlib.sha256(text.encode()).hexdigest()[:16]}")
        value = {k: v for k, v in vars(move).items() if k != "key"}
        _write(client.set_registered_model_tag, name, move.key, json.dumps(value, ensure_ascii=False))
        if move.to is not None:
            # Read again: another may have written this very move down meanwhile, and better.
            moves = {one.key: one for one in (*found.moves, *_recent(name, move.alias).moves, move)}
            kept = {"model": name, "moves": [vars(one) for one in _once(moves.values())[-_KEPT:]]}
            text = json.dumps(kept, ensure_ascii=False)
            _write(client.set_model_version_tag, name, str(move.to), RECENT + move.alias, text)
        for number in found.versions - {move.to}:  # only what has been read; a writer beside this one keeps its own
            _write(client.delete_model_version_tag, name, str(number), RECENT + move.alias)


def recent(name: str, alias: str) -> list[Move]:
    """The last moves of the alias, oldest first: as :func:`history`, and as fast with any number of versions.

    Raises:
        RegistryError: there is no such model.
    """
    with _mapped(tr("The registered model {name} cannot be read.", name=name)):
        return _recent(name, alias).moves


def history(name: str, alias: str) -> list[Move]:
    """The moves of the alias, oldest first.

    Raises:
        RegistryError: there is no such model.
    """
    with _mapped(tr("The registered model {name} cannot be read.", name=name)):
        found = _recent(name, alias)
        if not found.versions:
            return found.moves
        # None is missing where they lead from nowhere to where the alias is, each from where the one before went.
        stations = [None, *(move.to for move in found.moves)]
        if len(found.moves) < _KEPT and stations == [*(move.before for move in found.moves), alias_of(name, alias)]:
            return found.moves
        return _journal(name, alias)


def aliases(name: str) -> dict[str, int]:
    """The version's number of each alias.

    Raises:
        RegistryError: there is no such model.
    """
    with _mapped(tr("The registered model {name} cannot be read.", name=name)):
        return {alias: int(number) for alias, number in _client().get_registered_model(name).aliases.items()}


def champion_beside(name: str, run_id: str) -> Version | None:
    """The champion that another run's version is measured against; none where there is none, or it is this very run's.

    Raises:
        RegistryError: the registry does not answer.
    """
    number = alias_of(name, CHAMPION) if identity_of(name) is not None else None
    champion = resolve(f"models:/{name}/{number}") if number is not None else None
    return None if champion is None or champion.run_id == run_id else champion


def alias_of(name: str, alias: str) -> int | None:
    """The version's number that the alias points to; none where it points nowhere.

    Raises:
        RegistryError: there is no such model.
    """
    import mlflow

    with _mapped(tr("The registered model {name} cannot be read.", name=name)):
        try:
            return int(_client().get_model_version_by_alias(name, alias).version)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":  # so MLflow says that there is no such alias
                return None
            raise


def tag_of_promotion(key: str) -> dict[str, str]:
    """The tag by which :func:`promoted_as` finds a version: MLflow's index is by the names of tags, not by values."""
    return {f"{TAG_KEY}.{key}": "yes"}


def promoted_as(name: str, key: str) -> list[Version]:
    """The versions that promotions of this key have made, oldest first."""
    with _mapped(tr("The versions of {name} cannot be read.", name=name)):
        (tag_,) = tag_of_promotion(key)
        found = _client().search_model_versions(f"name = '{name}' and tag.`{tag_}` = 'yes'")
        return sorted((_version(v) for v in found), key=lambda v: v.number)


def sources() -> set[str]:
    """Where the files of every version of every registered model come from: addresses, and ``models:/m-…``."""
    with _mapped("The model registry cannot be read."):
        client, found, token = _client(), set(), None
        while True:
            page = client.search_model_versions(max_results=1000, page_token=token)
            found |= {version.source for version in page}
            found |= {f"models:/{version.model_id}" for version in page if getattr(version, "model_id", None)}
            token = page.token
            if not token:
                return found


def fetch(version: Version, target: Path | None = None, part: str = "") -> Path:
    """A local folder with the version's files, or one file or folder of it: the original where the store is local,
    else a copy.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    with _mapped(tr("The files of {uri} cannot be had.", uri=version.uri), mend="Check the artifact store."):
        store: Any = get_artifact_repository(version.uri)
        if target is None and not isinstance(store.repo, LocalArtifactRepository):
            target = fetched_folder()
        return Path(store.download_artifacts(part, str(target) if target else None))


def _write(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Call again where another writer was faster: MLflow looks and then inserts, so that two who set the same alias or
    tag for the first time, or make the next version, meet at the table's key; it says so and has written nothing.
    """
    import mlflow

    def another_was_faster(error: BaseException) -> bool:
        return isinstance(error, mlflow.exceptions.MlflowException) and (
            error.error_code == "TEMPORARILY_UNAVAILABLE" or any(sign in str(error) for sign in _CONFLICTS)
        )

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(another_was_faster),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=2),
        stop=tenacity.stop_after_attempt(10),
        reraise=True,
    )(call, *arguments, **named)


@dataclass(frozen=True)
class _Recent:
    """The last moves of an alias, and the versions whose tags have them.

    One, or more where writers have met. None where an older release wrote the moves, or the version was deleted: then
    the moves are those in the registered model's tags.
    """

    moves: list[Move]
    versions: set[int]


def _recent(name: str, alias: str) -> _Recent:
    key = RECENT + alias
    moves, versions = {}, set()
    for version in _client().search_model_versions(f"name = '{name}' and tag.`{key}` LIKE '%'"):
        with suppress(ValueError, TypeError, KeyError):  # a tag that somebody wrote by hand, or took away meanwhile
            kept = json.loads(version.tags[key])
            if kept["model"] == name:  # else MLflow copied the version, tags and all, from another
                moves.update({one["key"]: Move(**one) for one in kept["moves"]})
                versions.add(int(version.version))
    return _Recent(_once(moves.values())[-_KEPT:] if versions else _journal(name, alias), versions)


def _journal(name: str, alias: str) -> list[Move]:
    moves = []
    for key, value in _client().get_registered_model(name).tags.items():
        if key.startswith(_HISTORY):
            with suppress(ValueError, TypeError):  # a tag that somebody wrote by hand
                moves.append(Move(**json.loads(value), key=key))
    return _once(move for move in moves if move.alias == alias)


def _once(moves: Iterable[Move]) -> list[Move]:
    """In the order of time, and without what a server saw that whoever made the move wrote down as well."""
    kept: list[Move] = []
    for move in sorted(moves, key=lambda one: (one.time, one.key)):
        if kept and (kept[-1].before, kept[-1].to) == (move.before, move.to) and BY_HAND in {kept[-1].how, move.how}:
            kept[-1] = min(kept[-1], move, key=lambda one: one.how == BY_HAND)
        else:
            kept.append(move)
    return kept


def _client() -> Any:
    import mlflow

    client = mlflow.MlflowClient()
    # Before it sets a tag or an alias it fetches the registered model with every version, to see that it is no prompt.
    # Here a version of the model was read before. (Where a later MLflow calls this otherwise, writes are slow again.)
    client._raise_if_prompt = lambda _name: None
    return client


def _version(found: Any) -> Version:
    return Version(
        name=found.name,
        number=int(found.version),
        run_id=found.run_id or found.tags.get(TAG_RUN, ""),
        source=found.source,
        status=found.status,
        tags=dict(found.tags),
        created=found.creation_timestamp,
    )


@contextmanager
def _mapped(message: str, *, mend: str = _AGAIN) -> Iterator[None]:
    try:
        yield
    except NamesakeError:
        raise
    except Exception as error:  # MLflow raises its own, sqlalchemy's, requests' and the stores' errors
        told = tr("{message} ({store}: {error})", message=message, store=store_address(), error=said(error))
        raise RegistryError(told, mend=mend, kind="registry") from error
