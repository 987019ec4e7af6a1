"""What the shell offers after TAB: recipes, search spaces, registered models, aliases, versions, runs, served models.

Importing MLflow would take more than a second for each TAB, so its database is read as it lies, and a server is asked
over HTTP. Whatever goes wrong, nothing is offered: a shell is no place for an error. Where nothing is offered, bash and
zsh complete the names of files.
"""

from __future__ import annotations

import json
import os
import sqlite3
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

_SECONDS = 0.4
_MOST = 50
_BREAKS = (":", "@", "=")
"""What bash takes for the end of a word, in COMP_WORDBREAKS, although it is in the middle of ours."""

_cut = ""
"""What of the word bash has cut off, and puts back itself."""


def join_words() -> None:
    """Take ``models`` ``:`` ``/ccb`` for one word, before anybody reads what bash has split. Of the last word only the
    end is left, since bash wants the end alone; an ``@`` belongs to it (readline's special prefixes).
    """
    global _cut
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "")
    if not at.isdecimal() or not 0 < int(at) < len(words):
        return
    words = words[: int(at) + 1]
    joined = words[:1]
    for word in words[1:]:
        if len(joined) > 1 and (word.startswith(_BREAKS) or joined[-1].endswith(_BREAKS)):
            joined[-1] += word
        else:
            joined.append(word)
    if not joined[-1].startswith("-"):
        end = words[-1].lstrip(":=")
        end = f"@{end}" if words[-2].endswith("@") and end else end
        _cut, joined[-1] = joined[-1].removesuffix(end), end
    os.environ.update(COMP_WORDS="\n".join(joined), COMP_CWORD=str(len(joined) - 1))


def recipes(incomplete: str) -> list[str]:
    """Names of the recipes that come with the project."""
    from namesake import recipe

    return _offered(recipe.shipped(), incomplete)


def several_recipes(incomplete: str) -> list[str]:
    """``default,tutorial``: the names that are not among those before the last comma."""
    from namesake import recipe

    before, comma, _ = incomplete.rpartition(",")
    left = [name for name in recipe.shipped() if name not in before.split(",")]
    return _offered((f"{before}{comma}{name}" for name in left), incomplete)


def spaces(incomplete: str) -> list[str]:
    """Names of the search spaces that come with the project."""
    from namesake import search

    return _offered(search.shipped(), incomplete)


def served(incomplete: str, url: str, api_key: str = "") -> list[str]:
    """Ids of the models at an endpoint."""
    with suppress(Exception):
        request = urllib.request.Request(f"{url.rstrip('/')}/models", headers=_bearer(api_key))
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return _offered((str(one["id"]) for one in json.load(response)["data"]), incomplete)
    return []


def models(incomplete: str) -> list[str]:
    """Names of registered models."""
    return _offered((name for name, _, _ in _registered()), incomplete)


def aliases(incomplete: str) -> list[str]:
    """Aliases of any registered model."""
    return _offered(("champion", *(alias for _, found, _ in _registered() for alias in found)), incomplete)


def versions(incomplete: str) -> list[str]:
    """Numbers of versions."""
    newest = max((number for _, _, number in _registered()), default=0)
    return _offered((str(number) for number in range(newest, max(newest - _MOST, 0), -1)), incomplete)


def references(incomplete: str) -> list[str]:
    """``models:/ccb@champion``, ``models:/ccb/3``."""
    return _offered(_references(), incomplete)


def runs(incomplete: str) -> list[str]:
    """Ids of runs, newest first."""
    return _offered(_runs(), incomplete)


def targets(incomplete: str) -> list[str]:
    """Versions, then runs."""
    return _offered((*_references(), *_runs()), incomplete)


def _bearer(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _offered(found: Any, incomplete: str) -> list[str]:
    return [one.removeprefix(_cut) for one in dict.fromkeys(found) if one.startswith(f"{_cut}{incomplete}")]


def _references() -> Iterator[str]:
    for name, found, newest in _registered():
        yield from (f"models:/{name}@{alias}" for alias in found)
        yield from (f"models:/{name}/{number}" for number in range(newest, max(newest - _MOST, 0), -1))


def _registered() -> list[tuple[str, list[str], int]]:
    """Name, aliases and newest version of each registered model."""
    found: list[tuple[str, list[str], int]] = []
    with suppress(Exception):
        if (ask := _server()) is not None:
            for model in ask("registered-models/search", max_results=_MOST).get("registered_models", []):
                numbers = [int(version["version"]) for version in model.get("latest_versions", [])]
                names = [alias["alias"] for alias in model.get("aliases", [])]
                found.append((model["name"], names, max(numbers, default=0)))
        else:
            for (name,) in _rows("SELECT name FROM registered_models ORDER BY last_updated_time DESC"):
                names = [alias for (alias,) in _rows("SELECT alias FROM registered_model_aliases WHERE name = ?", name)]
                ((newest,),) = _rows("SELECT max(version) FROM model_versions WHERE name = ?", name)
                found.append((name, names, newest or 0))
    return found


def _runs() -> list[str]:
    with suppress(Exception):
        if (ask := _server()) is None:
            newest = "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT ?"
            return [run for (run,) in _rows(newest, _MOST)]
        asked = {"experiment_ids": ["0"], "max_results": _MOST}
        return [run["info"]["run_id"] for run in ask("runs/search", asked).get("runs", [])]
    return []


def _server() -> Callable[..., Any] | None:
    """How an MLflow server is asked; none where MLflow keeps its database here."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")):
        return None

    def ask(what: str, body: Any = None, **query: Any) -> Any:
        url = f"{uri.rstrip('/')}/api/2.0/mlflow/{what}?{urlencode(query)}"
        sent = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, sent, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return json.load(response)

    return ask


def _rows(query: str, *values: Any) -> list[tuple[Any, ...]]:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if not uri.startswith("sqlite:///"):
        return []
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_SECONDS)) as connection:
        return connection.execute(query, values).fetchall()
