"""The use case ``namesake status``: what is registered, where its aliases point, and what an endpoint serves."""

from __future__ import annotations

import ipaddress
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from namesake import registry, tracking
from namesake.errors import InputError, RegistryError
from namesake.messages import Message, joined, tr, translated
from namesake.paths import store_address
from namesake.registry import CHAMPION, Model, Move, Version
from namesake.terminal import Screen, moment, padded

DEFAULT_URL = "http://127.0.0.1:8000"

NEWEST = 5
"""How many versions are listed."""

_SECONDS = 5.0
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Judged:
    """A version and what was found of it: the gate's verdict, why it was overruled, why it could not be served."""

    number: int
    run: str
    gate: str
    override: str
    serving_error: str
    scores: Mapping[str, float]

    @classmethod
    def of(cls, version: Version) -> Judged:
        """Read from the version's tags."""
        return cls(
            version.number,
            version.run_id,
            version.tags.get(tracking.TAG_GATE, ""),
            version.tags.get(registry.TAG_OVERRIDE, ""),
            version.tags.get(registry.TAG_SERVING_ERROR, ""),
            version.scores,
        )


@dataclass(frozen=True)
class Registered:
    """A registered model.

    Attributes:
        champion: the version that ``champion`` points to.
        moved: the move that brought it there; none where the history does not have it.
        aliases: every other alias.
        newest: the last versions, newest first.
    """

    name: str
    identity: str
    champion: Judged | None
    moved: Move | None
    aliases: Mapping[str, int]
    newest: tuple[Judged, ...]


@dataclass(frozen=True)
class Served:
    """What an endpoint says of itself.

    Attributes:
        state: ``serving``; ``waiting`` for its first version; ``silent``: nothing answers; ``locked``: it wants a key;
            ``foreign``: something else answers.
        version: ``models:/ccb/3``, and ``since`` when it answers (seconds since 1970; none where it does not say).
        follows: the reference it was started with.
        wanted: the version that ``follows`` points to by the registry; empty where that cannot be told from here.
        refused: versions it does not serve, and why.
    """

    url: str
    state: Literal["serving", "waiting", "silent", "locked", "foreign"]
    version: str = ""
    since: float | None = None
    follows: str = ""
    wanted: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def behind(self) -> bool | None:
        """Whether it serves another version than its alias points to; none where that cannot be told."""
        return self.version != self.wanted if self.version and self.wanted else None


@dataclass(frozen=True)
class Stored:
    """The store that was asked: its address, without a password, and whether it is there."""

    address: str
    made: bool


@dataclass(frozen=True)
class Status:
    """What is registered in which store, and what an endpoint serves of it."""

    store: Stored
    models: tuple[Registered, ...]
    endpoint: Served

    def record(self) -> dict[str, Any]:
        """As it goes into JSON."""
        return {**asdict(self), "endpoint": {**asdict(self.endpoint), "behind": self.endpoint.behind}}


def status(model: str = "", *, url: str = DEFAULT_URL, api_key: str = "") -> Status:
    """Look at the registered models of ours, or the one of that name, and at an endpoint.

    Raises:
        InputError: the URL is none.
        RegistryError, TrackingError: MLflow failed, or there is no such model.
    """
    endpoint = served(url, api_key=api_key)
    # A store that is not there yet is left so: MLflow would make it.
    store = Stored(store_address(), tracking.store().made)
    models = registry.models() if store.made else []
    aliases = {f"models:/{one.name}@{alias}": to for one in models for alias, to in one.aliases.items()}
    if endpoint.follows in aliases:
        name = endpoint.follows.rpartition("@")[0]
        endpoint = replace(endpoint, wanted=f"{name}/{aliases[endpoint.follows]}")
    shown = tuple(_registered(one) for one in models if model in {"", one.name})
    if model and not shown:
        raise RegistryError(
            tr("There is no registered model {model} of ours in {store}.", model=model, store=store.address),
            mend="`namesake status` lists them.",
        )
    return Status(store, shown, endpoint)


def served(url: str, *, api_key: str = "", seconds: float = _SECONDS) -> Served:
    """Ask an endpoint what it serves. One that does not answer is no error.

    Raises:
        InputError: the URL is none.
    """
    url = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError(
            "url", url, "is no URL of an endpoint", mend=tr("Write it as {default_url}.", default_url=DEFAULT_URL)
        )
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(f"{url}/v1/version", headers=headers)
        with opener(parts.hostname or "").open(request, timeout=seconds) as answer:
            about = json.loads(answer.read(_MOST_BYTES))
        follows, refused, live = str(about["uri"]), dict(about["refused"]), about["live"]
        if live is None:
            return Served(url, "waiting", follows=follows, refused=refused)
        since = live.get("since")
        return Served(url, "serving", live["version"], since and float(since), follows, refused=refused)
    except urllib.error.HTTPError as error:
        return Served(url, "locked" if error.code in {401, 403} else "foreign")
    except OSError:
        return Served(url, "silent")
    except Exception:  # what answers speaks no HTTP, or other JSON
        return Served(url, "foreign")


def opener(host: str) -> urllib.request.OpenerDirector:
    """What opens URLs there: past the proxy of the environment where the host is this machine."""
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    return urllib.request.build_opener(*((urllib.request.ProxyHandler({}),) if here else ()))


def show(found: Status, screen: Screen) -> None:
    """All of it on the terminal."""
    endpoint = found.endpoint
    screen.result(f"› {found.store.address}", "bold")
    if not found.store.made:
        told = translated("There is no such store yet; the first run makes it. MLFLOW_TRACKING_URI names another.")
        screen.result(f"  {told}")
    elif not found.models:
        screen.result(f"  {translated('Nothing has been promoted yet.')}")
    for model in found.models:
        _show_model(model, screen)
    screen.result(f"› {endpoint.url}", "bold")
    screen.result(f"  {translated(_told(endpoint))}", "yellow" if endpoint.behind else "")
    for uri, why in endpoint.refused.items():
        screen.warn(tr("{uri} is not served: {why}", uri=uri, why=why))


def _registered(model: Model) -> Registered:
    number = model.aliases.get(CHAMPION)
    champion = Judged.of(registry.resolve(f"models:/{model.name}/{number}")) if number is not None else None
    last = next(reversed(registry.recent(model.name, CHAMPION)), None)
    return Registered(
        model.name,
        model.identity,
        champion,
        last if last is not None and last.to == number else None,
        {alias: to for alias, to in sorted(model.aliases.items()) if alias != CHAMPION},
        tuple(Judged.of(version) for version in registry.newest_versions(model.name, NEWEST)),
    )


def _show_model(model: Registered, screen: Screen) -> None:
    screen.result(f"› {model.name}  {model.identity}", "bold")
    if model.champion is None:
        screen.result(tr("  {champion} points nowhere", champion=CHAMPION))
    else:
        moved = model.moved
        version = tr("version {number}", number=model.champion.number)
        if moved is None:
            told = tr("{version}; since when is not in the history", version=version)
        else:
            told = tr(
                "{version} since {time}, {how}", version=version, time=moment(moved.time), how=translated(moved.how)
            )
            told = tr("{told} by {who}", told=told, who=moved.who) if moved.who else told
            told = tr("{told}: {why}", told=told, why=moved.why) if moved.why else told
        screen.result(f"  {CHAMPION}  {translated(told)}")
        for label, text in _verdict(model.champion):
            screen.result(f"  {padded(translated(label), 9)} {translated(text)}")
    if model.aliases:
        aliases = (tr("{alias} version {number}", alias=alias, number=to) for alias, to in model.aliases.items())
        screen.result(tr("  aliases   {aliases}", aliases=joined(aliases, ", ")))
    for one in model.newest:
        label = padded(translated(tr("newest") if one is model.newest[0] else ""), 9)
        told = tr("version {number}  gate {verdict}", number=one.number, verdict=_word(one.gate))
        told = tr("{told}, overruled", told=told) if one.override else told
        screen.result(f"  {label} {translated(told)}")


def _verdict(version: Judged) -> list[tuple[str, str]]:
    scores = "  ".join(registry.told_scores(version.scores))
    failed = tr("failed: {error}", error=version.serving_error)
    rows = (
        (tr("gate"), version.gate or tr("never asked")),
        (tr("overruled"), version.override),
        (tr("scores"), scores),
        (tr("serving"), version.serving_error and failed),
    )
    return [(label, text) for label, text in rows if text]


def _word(verdict: str) -> Message:
    """A verdict's first word, by which it is told in a list."""
    words = {"passed": tr("passed"), "failed": tr("failed"), "": tr("never asked")}
    word = verdict.partition(":")[0]
    return words.get(word) or tr("{word}", word=word)


def _told(endpoint: Served) -> Message:
    if endpoint.state != "serving":
        return {
            "silent": tr("nothing answers there (`namesake serve` starts it)"),
            "locked": tr("answers, and wants a key: give --api-key or OPENAI_API_KEY"),
            "foreign": tr("something answers that is no `namesake serve`"),
            "waiting": tr("follows {uri}, no version answers yet", uri=endpoint.follows),
        }[endpoint.state]
    text = tr("serves {version}", version=endpoint.version)
    if endpoint.since is not None:
        text = tr("serves {version} since {time}", version=endpoint.version, time=moment(endpoint.since))
    if endpoint.behind:
        uri, wanted = endpoint.follows, endpoint.wanted
        return tr("{text}, behind {uri}, which points at {wanted}", text=text, uri=uri, wanted=wanted)
    if endpoint.follows == endpoint.version:
        return tr("{text} and stays there", text=text)
    return tr("{text}, follows {uri}", text=text, uri=endpoint.follows)
