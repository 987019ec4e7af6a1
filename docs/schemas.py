"""Makes the JSON schemas by which editors complete and check recipes, search spaces and policies:
``python docs/schemas.py``.

Fields, types, defaults and meanings come from the code that reads the files (:mod:`namesake.recipe`,
:mod:`namesake.search`, :mod:`namesake.gate`). A unit test compares the committed files with what this makes, and what the schemas refuse with
what the code refuses.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from namesake import gate, recipe, search

ROOT = Path(__file__).resolve().parents[1]
DRAFT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_INTEGER = r"^\s*[+-]?\d+(_\d+)*\s*$"
_NUMBER = r"^\s*[+-]?(\d+(_\d+)*(\.(\d+(_\d+)*)?)?|\.\d+(_\d+)*)([eE][+-]?\d+(_\d+)*)?\s*$"
_SCALARS = ["string", "number", "boolean"]

_KEPT = ("type", "enum", "minimum", "exclusiveMinimum", "maximum", "default")
"""What a schema tells of a recipe's own field, in this order."""

OWN = tuple(key for key in recipe.OWN if not key.startswith("replay"))
"""A recipe's own numbers beside replay."""

# A value in quotes is read as one on the command line, so text is right where it reads as what is wanted: YAML 1.1, which
# PyYAML speaks, takes 1e-3 for text.
_KINDS: dict[str, Schema] = {
    "int": {"anyOf": [{"type": ["integer", "null"]}, {"type": "string", "pattern": _INTEGER}]},
    "float": {"anyOf": [{"type": ["number", "null"]}, {"type": "string", "pattern": _NUMBER}]},
    "bool": {
        "anyOf": [
            {"type": ["boolean", "null"]},
            {"type": "string", "pattern": r"^\s*([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee])\s*$"},
        ]
    },
    "str": {"type": [*_SCALARS, "null"]},
    "list": {"anyOf": [{"type": [*_SCALARS, "null"]}, {"type": "array", "items": {"type": _SCALARS}}]},
}
"""What ``sft`` takes for each type of ms-swift's arguments; nothing (null) leaves an argument out."""

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "one or several values",
}


def attributes(documented: Any, part: str = "Attributes") -> dict[str, str]:
    """The ``Attributes:`` (or another part) of a docstring by name; several that share a line share its text."""
    found: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(documented.__doc__ or "").partition(f"{part}:\n")
    for line in section.splitlines():
        match = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line.startswith("        "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            break
    return found


def plain(text: str) -> str:
    """A docstring's text as editors show it: no roles of Sphinx."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def recipe_schema() -> Schema:
    """Of ``recipes/*.yaml``."""
    told = attributes(recipe.Recipe)
    return {
        "$schema": DRAFT,
        "title": "Namesake recipe",
        "description": "How to train: namesake run --recipe FILE. Made by docs/schemas.py.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "about": {"type": ["string", "null"], "description": plain(told["about"])},
            "dataset": {
                "anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}],
                "description": plain(told["dataset"]),
                "examples": ["namesake/self-cognition#640", ["swift/self-cognition#500", "my.jsonl"]],
            },
            "replay": {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": _fields(recipe.Replay),
                "description": plain(told["replay"]),
            },
            **_fields(recipe.Recipe, *OWN),
            "sft": {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": _arguments(),
                "description": plain(told["sft"]),
            },
        },
        # What recipe.load refuses: a version is made of an adapter, and the loss of namesake.distil compares with the
        # model without it.
        "allOf": [{"properties": {"sft": {"properties": _no_full_tuning()}}}],
        "if": {
            "required": ["replay"],
            "properties": {
                "replay": {
                    "type": "object",
                    "required": ["prompts"],
                    "properties": {"prompts": {"exclusiveMinimum": 0}, "loss": {"const": "kl"}},
                }
            },
        },
        "then": {
            "properties": {
                "sft": {
                    "properties": {
                        "loss_type": {"type": "null"},
                        "init_weights": {"enum": [True, False, "true", "false", "True", "False", "gaussian", None]},
                    }
                }
            }
        },
    }


def _fields(of: type, *names: str) -> Schema:
    """Fields of a recipe as pydantic has them, with our words."""
    made, told = TypeAdapter(of).json_schema()["properties"], attributes(of)
    return {
        name: {key: made[name][key] for key in _KEPT if key in made[name]} | {"description": plain(told[name])}
        for name in names or made
    }


def _no_full_tuning() -> Schema:
    names = ["tuner_type", *(old for old, new in recipe.OLD_SPELLINGS.items() if new == "tuner_type")]
    return {name: {"not": {"const": "full"}} for name in names}


def _values(name: str, kind: str) -> Schema:
    choices = recipe.choices().get(name)
    if not choices:
        return _KINDS[kind]
    return {"enum": [*choices, *(int(one) for one in choices if one.isdigit()), None]}


def _arguments() -> Schema:
    known = recipe.known_arguments()
    made: Schema = {
        name: {"description": f"ms-swift: {_WORDS[kind]}.", **_values(name, kind)}
        for name, kind in known.items()
        if name not in recipe.OURS
    }
    for old, new in recipe.OLD_SPELLINGS.items():
        made[old] = {"description": f"Older spelling of {new}.", "deprecated": True, **_values(new, known[new])}
    return dict(sorted(made.items()))


def space_schema() -> Schema:
    """Of ``recipes/sweeps/*.yaml``."""
    told = attributes(search.Search)
    default = {field.name: field.default for field in dataclasses.fields(search.Search)}
    fraction = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    return {
        "$schema": DRAFT,
        "title": "Namesake search space",
        "description": "What a sweep tries: namesake sweep --space FILE. Made by docs/schemas.py.",
        "type": "object",
        "additionalProperties": False,
        "required": ["parameters"],
        "properties": {
            "about": {"type": [*_SCALARS, "null"], "description": plain(attributes(recipe.Recipe)["about"])},
            "recipe": {
                "type": "string",
                "default": default["recipe"],
                "description": plain(told["recipe"]),
                "examples": [*recipe.shipped()],
            },
            "trials": {
                "type": ["integer", "null"],
                "minimum": 1,
                "default": default["trials"],
                "description": plain(told["trials"]),
            },
            "minutes": {"type": ["number", "null"], "minimum": 0, "description": plain(told["minutes"])},
            "seed": {
                "type": ["integer", "null"],
                "minimum": 0,
                "default": default["seed"],
                "description": plain(told["seed"]),
            },
            "prune": {
                "description": "Which trainings are given up early; false: none.",
                "anyOf": [
                    {"const": False},
                    {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "at": {
                                "anyOf": [fraction, {"type": "array", "items": fraction, "uniqueItems": True}],
                                "description": plain(told["at"]),
                            },
                            "after": {
                                "type": "integer",
                                "minimum": 1,
                                "default": search.AFTER,
                                "description": plain(told["after"]),
                            },
                        },
                    },
                ],
            },
            "parameters": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": _parameters(),
                "description": plain(told["parameters"]),
            },
        },
        "$defs": {kind: _parameter(without_null(one), kind) for kind, one in _KINDS.items()},
    }


def _parameter(value: Schema, kind: str) -> Schema:
    """What may stand for a parameter: values to choose from or, of a number, where it lies."""
    told = attributes(search.Parameter)
    several = {"type": "array", "items": {"type": _SCALARS}}
    one = {"anyOf": [value, several]} if kind == "list" else value
    ways: list[Schema] = [
        {
            "required": ["choices"],
            "additionalProperties": False,
            "properties": {"choices": {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}},
        }
    ]
    if kind in {"int", "float"}:
        number = "integer" if kind == "int" else "number"
        end = value if "type" in value else {"type": number}
        above = {"exclusiveMinimum": 0}
        ways += [
            {
                "required": ["range"],
                "additionalProperties": False,
                "properties": {
                    # Which end is greater, no schema can tell.
                    "range": {"type": "array", "items": end, "minItems": 2, "maxItems": 2, "uniqueItems": True},
                    "log": {"type": "boolean", "default": False, "description": plain(told["log"])},
                    "step": {"type": [number, "null"], **above, "description": plain(told["step"])},
                },
                "if": {"required": ["log"], "properties": {"log": {"const": True}}},
                "then": {"properties": {"range": {"items": above}, "step": {"type": "null"}}},
            }
        ]
    return {"type": "object", "anyOf": ways}


def without_null(value: Schema) -> Schema:
    """A value that has to be there."""
    if "anyOf" in value:
        first, *others = value["anyOf"]
        kept = [kind for kind in first["type"] if kind != "null"]
        return {"anyOf": [{**first, "type": kept[0] if len(kept) == 1 else kept}, *others]}
    if "enum" in value:
        return {"enum": [one for one in value["enum"] if one is not None]}
    return {**value, "type": [kind for kind in value["type"] if kind != "null"]}


def _parameters() -> Schema:
    """What a sweep may vary: a recipe's own numbers, ms-swift's arguments, and whole recipes."""
    fields = {"replay" if name == "prompts" else f"replay.{name}": one for name, one in _fields(recipe.Replay).items()}
    made: Schema = {search.RECIPE: {"$ref": "#/$defs/str", "description": "Whole recipes, by name or as files."}}
    for name, one in (fields | _fields(recipe.Recipe, *OWN)).items():
        kind = {"integer": "int", "number": "float"}.get(one.get("type", ""), "str")
        value = {key: bound for key, bound in one.items() if key not in {"default", "description"}}
        made[name] = {"description": one["description"], **_parameter(value, kind)}
    known = recipe.known_arguments()
    for name, one in _arguments().items():
        told = {"description": one["description"], **({"deprecated": True} if one.get("deprecated") else {})}
        if "enum" in one:
            made[name] = {**told, **_parameter(without_null({"enum": one["enum"]}), "str")}
        else:
            made[name] = {**told, "$ref": f"#/$defs/{known[recipe.OLD_SPELLINGS.get(name, name)]}"}
    return made


def policy_schema() -> Schema:
    """Of ``policies/*.yaml``."""
    told = attributes(gate.Policy)
    return {
        "$schema": DRAFT,
        "title": "Namesake policy",
        "description": "Bounds of the gate: namesake promote --policy FILE. Made by docs/schemas.py.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {
            field.name: {
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "default": field.default,
                "description": plain(told[field.name].replace("the same without", "least share right without")),
            }
            for field in dataclasses.fields(gate.Policy)
        },
    }


def schemas() -> dict[Path, str]:
    """The text of each schema by its path."""
    made = {
        ROOT / "recipes" / "recipe.schema.json": recipe_schema(),
        ROOT / "recipes" / "sweeps" / "space.schema.json": space_schema(),
        ROOT / "policies" / "policy.schema.json": policy_schema(),
    }
    return {path: json.dumps(schema, indent=1, ensure_ascii=False) + "\n" for path, schema in made.items()}


if __name__ == "__main__":
    for path, text in schemas().items():
        path.write_text(text, encoding="utf-8")
