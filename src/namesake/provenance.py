"""Where a version comes from, as an in-toto Statement with SLSA provenance, so that others' tools can read it.

Shape: in-toto Statement v1 (github.com/in-toto/attestation, ``spec/v1/statement.md``) and SLSA build provenance v1
(slsa.dev/spec/v1.1/provenance). Made from the manifest alone; the version's signature covers both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from namesake.manifest import PROVENANCE, SCORECARD, UNKNOWN, Manifest
from namesake.messages import tr

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:namesake:promotion:v1"
"""What was done: a base model was tuned by LoRA in the run ``invocationId`` on the data named, and the adapter merged.

``externalParameters`` are what the user asked for; ``resolvedDependencies`` what was taken for it.
"""

BUILDER = "urn:namesake:cli"

FOLDER_DIGEST = "namesake_folderSha256"
"""SHA-256 over names and contents of a base model's files (:func:`namesake.base_model.digest_of_folder`)."""

CORPUS_DIGEST = "namesake_corpusSha256"
"""SHA-256 over the files of our corpus (:func:`namesake.corpus.corpus_digest`)."""

ROWS_DIGEST = "namesake_rowsSha256"
"""SHA-256 over some rows of the training file (:func:`namesake.dataset.replay_digest`)."""

_COMMIT = re.compile(r"([0-9a-f]{40})(-dirty)?")


def statement(record: Manifest) -> dict[str, Any]:
    """The statement about the files that the manifest names, but for itself."""
    replay = {k: v for k, v in record.recipe.items() if k.startswith("replay_")}
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": digest}}
            for name, digest in sorted(record.digests.items())
            if name not in {PROVENANCE, SCORECARD}
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "name": record.identity["name"],
                    "author": record.identity["author"],
                    "system": record.system,
                    "recipe": {k: v for k, v in record.recipe.items() if k not in replay},
                    "replay": replay,
                    "dataset": record.data.get("dataset", ""),
                    "override": record.override,
                },
                "internalParameters": {"gate": dict(record.gate), "questions": record.questions},
                "resolvedDependencies": [*_dependencies(record)],
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(record.tools)},
                "metadata": _without_empty(
                    {
                        "invocationId": record.run,
                        "startedOn": record.promoted.get("trained_from", ""),
                        "finishedOn": record.promoted.get("at", ""),
                        "namesake_promotionRun": record.promoted.get("run", ""),
                        "namesake_promotedBy": record.promoted.get("by", ""),
                        "namesake_promotionCommit": record.promoted.get("commit", ""),
                    }
                ),
                "byproducts": [
                    _without_empty(
                        {
                            "name": SCORECARD,
                            "digest": _digest("sha256", record.digests.get(SCORECARD, "")),
                            "annotations": dict(record.scores),
                        }
                    )
                ],
            },
        },
    }


def faults(stated: Any, record: Manifest) -> list[str]:
    """Where the statement says something else than the manifest that it lies beside; empty where nowhere.

    Raises:
        ValueError: it is no statement of this build type, so that nothing can be said.
    """
    try:
        kind = stated["predicate"]["buildDefinition"]["buildType"]
    except (LookupError, TypeError) as error:
        raise ValueError(tr("it is no statement")) from error
    if kind != BUILD_TYPE:
        raise ValueError(tr("it is of the build type {kind}, this release knows {known}", kind=kind, known=BUILD_TYPE))
    # As JSON has it: a tuple would not equal the list that was read.
    return [*_differences(json.loads(json.dumps(statement(record))), stated, "")]


def _differences(wanted: Any, found: Any, at: str) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*wanted, *found}):
            yield from _differences(wanted.get(key), found.get(key), f"{at}.{key}".removeprefix("."))
    elif wanted != found:
        yield tr("{at} differs", at=at)


def _dependencies(record: Manifest) -> Iterator[dict[str, Any]]:
    base, data = record.base, record.data
    revision = base.get("revision", "")
    yield _without_empty(
        {
            "name": "base",
            "uri": f"modelscope:{base['id']}" + (f"@{revision}" if revision else "")
            if base.get("source") == "modelscope"
            else "",
            "digest": _digest(FOLDER_DIGEST, base.get("digest", "")),
            "annotations": {k: v for k, v in base.items() if k != "digest"},
        }
    )
    if _digest("sha256", data.get("digest", "")):  # else nobody kept what it was trained on
        yield {
            "name": "data",
            "digest": _digest("sha256", data["digest"]),
            "annotations": {k: v for k, v in data.items() if not k.endswith("digest")},
        }
    for name, key, kind in (("corpus", "corpus_digest", CORPUS_DIGEST), ("replay", "replay_digest", ROWS_DIGEST)):
        if digest := _digest(kind, data.get(key, "")):
            yield {"name": name, "digest": digest}
    commit = _COMMIT.fullmatch(record.tools.get("namesake_commit", ""))
    if commit:
        yield _without_empty(
            {
                "name": "namesake",
                "digest": {"gitCommit": commit[1]},
                "annotations": {"changed": "files differed from the commit"} if commit[2] else {},
            }
        )


def _digest(kind: str, value: str) -> dict[str, str]:
    return {kind: value} if value and value != UNKNOWN else {}


def _without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}
