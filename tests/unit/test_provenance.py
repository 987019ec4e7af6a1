"""The statement of provenance has the published shape, and says what the manifest says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from namesake import provenance
from namesake.manifest import PROVENANCE, SCORECARD, UNKNOWN
from tests.unit.test_model_card import RECORD

DIGESTS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": {"type": "string", "pattern": "^[0-9a-f]+$"},
}
DESCRIPTOR = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "uri": {"type": "string", "format": "uri"},
        "digest": DIGESTS,
        "content": {"type": "string"},
        "annotations": {"type": "object"},
    },
    "anyOf": [{"required": ["uri"]}, {"required": ["digest"]}, {"required": ["content"]}],
    "additionalProperties": False,
}
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$"}
SCHEMA: dict[str, Any] = {
    # in-toto/attestation spec/v1/statement.md and resource_descriptor.md; slsa.dev/spec/v1.1/provenance
    "type": "object",
    "required": ["_type", "subject", "predicateType", "predicate"],
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "items": {**DESCRIPTOR, "required": ["name", "digest"]},
            "uniqueItems": True,
        },
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "predicate": {
            "type": "object",
            "required": ["buildDefinition", "runDetails"],
            "additionalProperties": False,
            "properties": {
                "buildDefinition": {
                    "type": "object",
                    "required": ["buildType", "externalParameters"],
                    "properties": {
                        "buildType": {"type": "string", "pattern": "^[a-z]+:.+"},
                        "externalParameters": {"type": "object", "minProperties": 1},
                        "internalParameters": {"type": "object"},
                        "resolvedDependencies": {"type": "array", "items": DESCRIPTOR},
                    },
                    "additionalProperties": False,
                },
                "runDetails": {
                    "type": "object",
                    "required": ["builder"],
                    "properties": {
                        "builder": {
                            "type": "object",
                            "required": ["id"],
                            "properties": {
                                "id": {"type": "string", "pattern": "^[a-z]+:.+"},
                                "version": {"type": "object", "additionalProperties": {"type": "string"}},
                            },
                            "additionalProperties": False,
                        },
                        "metadata": {
                            "type": "object",
                            "properties": {
                                "invocationId": {"type": "string"},
                                "startedOn": TIME,
                                "finishedOn": TIME,
                            },
                            # extension fields are <vendor>_<fieldname>
                            "patternProperties": {"^namesake_": {"type": "string"}},
                            "additionalProperties": False,
                        },
                        "byproducts": {"type": "array", "items": DESCRIPTOR},
                    },
                    "additionalProperties": False,
                },
            },
        },
    },
    "additionalProperties": False,
}
WHOLE = replace(
    RECORD,
    digests={**RECORD.digests, "README.md": "1" * 64, SCORECARD: "2" * 64},
    data={**RECORD.data, "corpus_digest": "3" * 64, "replay_digest": "4" * 64},
    promoted={**RECORD.promoted, "run": "5" * 32, "trained_from": "2026-11-25T19:00:00Z"},
)


def stated(record: Any = WHOLE) -> dict[str, Any]:
    """The statement, as it is read again."""
    return json.loads(json.dumps(provenance.statement(record)))  # type: ignore[no-any-return]


def test_the_statement_has_the_published_shape() -> None:
    jsonschema.validate(stated(), SCHEMA)
    jsonschema.validate(stated(replace(WHOLE, data={"dataset": "x", "digest": UNKNOWN}, promoted={})), SCHEMA)


@pytest.mark.parametrize("part", ["_type", "subject", "predicate"])
def test_the_schema_notices_what_is_missing(part: str) -> None:
    broken = stated()
    del broken[part]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_it_names_what_the_version_was_made_of() -> None:
    predicate = stated()["predicate"]
    built = {one["name"]: one for one in predicate["buildDefinition"]["resolvedDependencies"]}
    assert built["base"]["uri"] == "modelscope:Qwen/Qwen2.5-0.5B-Instruct"
    assert built["base"]["digest"] == {provenance.FOLDER_DIGEST: "b" * 64}
    assert built["data"]["digest"] == {"sha256": "d" * 64}
    assert built["corpus"]["digest"] == {provenance.CORPUS_DIGEST: "3" * 64}
    assert built["replay"]["digest"] == {provenance.ROWS_DIGEST: "4" * 64}
    assert built["namesake"]["digest"] == {"gitCommit": "c" * 40}
    asked = predicate["buildDefinition"]["externalParameters"]
    assert (asked["name"], asked["author"], asked["recipe"]["lora_rank"]) == ("踩踩背 CCB", "老爷爷 OldGrandpa", "8")
    assert asked["replay"] == {"replay_prompts": "800"}
    run = predicate["runDetails"]
    assert run["metadata"]["invocationId"] == "r" * 32
    assert run["metadata"]["namesake_promotedBy"] == "ann"
    assert run["byproducts"][0]["digest"] == {"sha256": "2" * 64}
    assert run["byproducts"][0]["annotations"]["identity"] == 0.25
    assert [one["name"] for one in stated()["subject"]] == ["README.md", "model/model.safetensors"]


def test_its_own_digest_changes_nothing_in_it() -> None:
    later = replace(WHOLE, digests={**WHOLE.digests, PROVENANCE: "6" * 64})
    assert provenance.faults(stated(), later) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"run": "x" * 32}, "predicate.runDetails.metadata.invocationId differs"),
        ({"digests": {"model/model.safetensors": "0" * 64}}, "subject differs"),
        ({"recipe": {}}, "predicate.buildDefinition.externalParameters.recipe.lora_rank differs"),
    ],
)
def test_what_differs_from_the_manifest_is_named(change: dict[str, Any], told: str) -> None:
    assert told in provenance.faults(stated(), replace(WHOLE, **change))


@pytest.mark.parametrize("other", [{}, [], None, {"predicate": {"buildDefinition": {"buildType": "urn:other"}}}])
def test_what_is_another_statement_is_not_judged(other: Any) -> None:
    with pytest.raises(ValueError, match=r"statement|build type"):
        provenance.faults(other, WHOLE)
