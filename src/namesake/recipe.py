"""A recipe file and overrides of it become one frozen recipe, and that becomes ms-swift's arguments.

Every fault is named in one message, before anything is trained. The names and types of ms-swift's arguments are kept
in ``sft_arguments.json`` (made by ``make generate`` from the pinned ms-swift, checked for drift by a test), so that no
ten seconds of imports stand before a typing error is told.
"""

from __future__ import annotations

import difflib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from namesake.errors import RecipeError, said
from namesake.messages import joined, tr

OLD_SPELLINGS = {
    "train_type": "tuner_type",
    "sft_type": "tuner_type",
    "ckpt_dir": "adapters",
    "custom_register_path": "external_plugins",
    "lora_target_modules": "target_modules",
}
"""Arguments of ms-swift 2 and 3 and what ms-swift 4 calls them."""

_LONGEST_SYSTEM = 6000
"""Characters of a parameter in MLflow, where a promotion reads the system prompt from."""

_KEEPING_THE_BASE = {"true", "false", "gaussian"}
"""``init_weights`` that leave the base's weights as they are; PiSSA, OLoRA and others take the adapter out of them."""

OURS = {
    "model": "-P model=",
    "dataset": "-P dataset=",
    "model_name": "-P name=",
    "model_author": "-P author=",
    "resume_from_checkpoint": "a run of its own",
    "use_cpu": "nothing: it follows from the machine",
}
"""Arguments that a recipe must not hold, since Namesake gives them itself, and what to use instead."""

ReplayLoss = Literal["kl", "cross_entropy"]
REPLAY_LOSSES: tuple[str, ...] = get_args(ReplayLoss)
KL_LOSS_TYPE = "replay_kl"
"""What ms-swift's ``--loss_type`` calls the first of them."""

READING = "seconds_reading"
"""What that loss logs once: for how long the base read the replay rows, where the cache did not have it."""

Value = str | int | float | bool | list[str]

OWN = (
    "replay",
    "replay.max_new_tokens",
    "replay.loss",
    "replay.weight",
    "replay.opening_weight",
    "other_systems",
    "held_out",
)
"""What overrides may set beside ms-swift's arguments; ``replay`` alone is the number of prompts."""


def _a_number(value: object) -> object:
    if isinstance(value, bool):  # which pydantic would take for 0 or 1
        raise PydanticCustomError("float_type", "is no number")
    return value


def _names(value: object) -> object:
    return tuple(value.split()) if isinstance(value, str) else value


Count = Annotated[int, Field(ge=0), BeforeValidator(_a_number)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_a_number)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_a_number)]

_CHECKED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CHECKED)
class Replay:
    """How much replay is mixed in, and how it is learnt.

    Attributes:
        prompts: the number of plain prompts.
        max_new_tokens: the token limit of the base model's replies to them.
        loss: ``kl`` (to the base's own distribution, :mod:`namesake.distil`) or ``cross_entropy`` on the replies.
        weight: how much a token of a reply counts against one of the data (``kl`` only).
        opening_weight: how much more its first tokens count, where a reply turns to the name or does not.
    """

    prompts: Count = 0
    max_new_tokens: Count = 64
    loss: ReplayLoss = "kl"
    weight: Weight = 1.0
    opening_weight: Weight = 1.0

    @property
    def distils(self) -> bool:
        """Whether the loss of :mod:`namesake.distil` is wanted."""
        return self.prompts > 0 and self.loss == "kl"

    @property
    def environment(self) -> dict[str, str]:
        """What the loss has to be told; ms-swift has no arguments for plugins."""
        weights = {"WEIGHT": self.weight, "OPENING_WEIGHT": self.opening_weight}
        return {f"NAMESAKE_REPLAY_{key}": f"{value:g}" for key, value in weights.items()} if self.distils else {}


@dataclass(frozen=True, config=_CHECKED)
class Recipe:
    """How to train.

    Attributes:
        name: what the run is called after.
        about: one line for people.
        dataset: data sets as ms-swift names them (``id#500``, files), or the builtin corpus.
        replay: plain prompts answered by the base model.
        other_systems: every N-th row is trained under another system prompt; 0 for none.
        held_out: share of the held-out questions that the run and its promotion ask, for a quick trial; the gate wants
            all of them.
        sft: arguments of ``swift sft``.
    """

    name: str
    about: str
    dataset: Annotated[tuple[str, ...], BeforeValidator(_names)]
    replay: Replay = field(default_factory=Replay)
    other_systems: Count = 0
    held_out: Share = 1.0
    sft: dict[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str | None:
        """The system prompt that is trained under, and that a version answers under."""
        system = self.sft.get("system")
        return str(system) if system is not None else None

    def argv(self) -> list[str]:
        """The arguments as ms-swift's command line takes them."""
        return to_argv(self.sft)


def load(wanted: str | Recipe, *, overrides: Mapping[str, str] | None = None, args: str = "") -> Recipe:
    """Read a shipped recipe by name (``default``, ``tutorial``) or a file, and lay the overrides over it.

    Args:
        wanted: a name in ``recipes/``, a YAML file, or a recipe made in Python, which is checked like a file.
        overrides: single arguments, ``{"learning_rate": "1e-3"}``, and any of :data:`OWN`.
        args: more of them as one command line, ``--lora_rank 16 --num_train_epochs 2``.

    Raises:
        RecipeError: with every fault of the recipe and of the overrides.
    """
    recipe = wanted if isinstance(wanted, Recipe) else _read(wanted)
    given = {**parse_args(args), **(overrides or {})}
    faults: list[str] = []
    own = _own(recipe, {key: given.pop(key) for key in OWN if key in given}, faults)
    given = {OLD_SPELLINGS.get(key, key): value for key, value in given.items()}
    sft = {**recipe.sft, **given}
    if "target_modules" in given and "target_regex" not in given:
        sft.pop("target_regex", None)  # ms-swift would let it win over what was asked for
    checked = {key: _checked(key, value, faults) for key, value in sft.items()}
    if checked.get("tuner_type") == "full":
        faults.append("tuner_type full makes no adapter, which is what a version is made of")
    if own.replay.distils and "loss_type" in checked:
        faults.append("replay loss kl takes no other loss_type")
    if own.replay.distils and str(checked.get("init_weights", True)).lower() not in _KEEPING_THE_BASE:
        faults.append(
            tr(
                "init_weights={value} changes the base, which replay loss kl is about; use replay.loss=cross_entropy",
                value=checked["init_weights"],
            )
        )
    if isinstance(checked.get("system"), str):
        checked["system"] = _system(str(checked["system"]), faults)
    if faults:
        raise RecipeError(
            "recipe",
            recipe.name if isinstance(wanted, Recipe) else wanted,
            joined(faults),
            mend="Correct these; `swift sft --help` explains each argument.",
        )
    return replace(own, sft=checked)


def _system(value: str, faults: list[str]) -> str:
    """The system prompt as ms-swift trains under it (its ``TemplateArguments``): of a .txt file what is in it, and a
    backslash with an n as the end of a line. Everybody else has to ask under the same.
    """
    if value.endswith(".txt"):
        try:
            value = Path(value).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            faults.append(tr("system={value} cannot be read ({error})", value=value, error=said(error)))
        else:
            if value.endswith(".txt"):
                faults.append(tr("system={value} would be read as a file again", value=value))
    if len(value) > _LONGEST_SYSTEM:
        faults.append(tr("system is longer than the {most} characters that MLflow keeps", most=_LONGEST_SYSTEM))
    return value.replace("\\n", "\n")


def setting(recipe: Recipe, key: str) -> Value | None:
    """What the recipe says of an argument of ms-swift or one of :data:`OWN`; none where it leaves it open."""
    if key in {"other_systems", "held_out"}:
        own: Value = getattr(recipe, key)
        return own
    if key in OWN:
        value: Value = getattr(recipe.replay, key.partition(".")[2] or "prompts")
        return value
    return recipe.sft.get(OLD_SPELLINGS.get(key, key))


def _own(recipe: Recipe, given: Mapping[str, str], faults: list[str]) -> Recipe:
    """The recipe with the overrides of its own fields laid over it."""
    beside = {key: value for key, value in given.items() if not key.startswith("replay")}
    named = {key.partition(".")[2] or "prompts": value for key, value in given.items() if key not in beside}
    try:
        recipe = replace(recipe, replay=replace(recipe.replay, **named))  # type: ignore[arg-type]
    except ValidationError as error:
        faults += _told(error, "replay")
    try:
        return replace(recipe, **beside)  # type: ignore[arg-type]
    except ValidationError as error:
        faults += _told(error)
        return recipe


def _told(error: ValidationError, *under: str) -> Iterator[str]:
    """What pydantic found, in our words."""
    for one in error.errors():
        path, value, kind = [*under, *map(str, one["loc"])], one["input"], one["type"]
        key = "replay" if path == ["replay", "prompts"] else ".".join(path)
        if kind == "unexpected_keyword_argument":
            yield tr("{key} is nothing that a recipe has", key=key)
        elif kind.startswith("int_"):
            yield tr("{key}={value} is no whole number", key=key, value=value)
        elif kind.startswith("float_"):
            yield tr("{key}={value} is no number", key=key, value=value)
        elif kind == "finite_number":
            yield tr("{key}={value} is not finite", key=key, value=value)
        elif kind == "literal_error":
            yield tr("{key}={value} is none of {allowed}", key=key, value=value, allowed=", ".join(REPLAY_LOSSES))
        elif kind == "greater_than_equal":
            yield tr("{key}={value} is less than none", key=key, value=value)
        elif kind == "greater_than":
            yield tr("{key}={value} is not greater than 0", key=key, value=value)
        elif kind == "less_than_equal":
            yield tr("{key}={value} is greater than 1", key=key, value=value)
        else:
            yield tr("{key}={value} is of the wrong kind", key=key, value=value)


def parse_args(line: str) -> dict[str, str]:
    """Split ``--lora_rank 16 --packing=true`` into a mapping. A key without a value is ``true``."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise RecipeError(
            "args", line, tr("cannot be split ({error})", error=error), mend="Close the quotes."
        ) from error
    return pairs(words)


def pairs(words: Sequence[str]) -> dict[str, str]:
    """``["--a", "1", "--b=2"]`` as a mapping; several values after one key are joined by spaces."""
    found: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = [value] if equals else []
        elif key:
            found[key].append(word)
        else:
            raise RecipeError("args", word, "stands before any --argument", mend="Write --argument value.")
    return {key: " ".join(values) if values else "true" for key, values in found.items()}


def to_argv(sft: Mapping[str, Value]) -> list[str]:
    """A mapping of arguments as a command line; lists become several words."""
    words: list[str] = []
    for key, value in sft.items():
        words.append(f"--{key}")
        if isinstance(value, list):
            words += value
        elif isinstance(value, bool):
            words.append(str(value).lower())
        else:
            words.append(str(value))
    return words


def shipped() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


@cache
def known_arguments() -> dict[str, str]:
    """ms-swift's arguments: name to type (``int``, ``float``, ``bool``, ``str``, ``list``)."""
    return {name: kind if isinstance(kind, str) else "str" for name, kind in _arguments().items()}


@cache
def choices() -> dict[str, list[str]]:
    """The values of those of ms-swift's arguments that take only some."""
    return {name: kind for name, kind in _arguments().items() if isinstance(kind, list)}


@cache
def _arguments() -> dict[str, str | list[str]]:
    text = (resources.files(__package__) / "sft_arguments.json").read_text(encoding="utf-8")
    known: dict[str, str | list[str]] = json.loads(text)
    return known


def folder() -> Path:
    """Where the shipped recipes lie."""
    # In a checkout the recipes lie at the top, where people look for them.
    return Path(__file__).resolve().parents[2] / "recipes"


def _read(name_or_path: str) -> Recipe:
    path = shipped().get(name_or_path)
    with suppress(OSError, RuntimeError, ValueError):  # too long for a file name, no such user, a NUL
        given = Path(name_or_path).expanduser()
        path = path or (given if given.is_file() else None)
    if path is None:
        raise RecipeError(
            "recipe",
            name_or_path,
            "there is no such recipe or file",
            mend=tr("Use one of {names}, or give a YAML file.", names=", ".join(shipped())),
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            "recipe", str(path), tr("is not YAML ({error})", error=error), mend="Correct the file."
        ) from error
    fields = {"about", "dataset", "replay", "other_systems", "held_out", "sft"}
    if not isinstance(data, dict) or not isinstance(data.get("sft") or {}, dict) or set(data) - fields:
        raise RecipeError(
            "recipe",
            str(path),
            tr("holds something else than {fields}", fields=", ".join(sorted(fields))),
            mend="See recipes/default.yaml.",
        )
    sft = {OLD_SPELLINGS.get(str(k), str(k)): v for k, v in (data.pop("sft", None) or {}).items() if v is not None}
    beside = {"about": "", "dataset": (), **{key: value for key, value in data.items() if value is not None}}
    try:
        return Recipe(name=path.stem, sft=sft, **beside)
    except ValidationError as error:
        raise RecipeError("recipe", str(path), joined([*_told(error)]), mend="See recipes/default.yaml.") from error


def _checked(key: str, value: Any, faults: list[str]) -> Value:
    if key in OURS:
        faults.append(tr("{key} is not for a recipe, use {use}", key=key, use=OURS[key]))
        return ""
    kind = known_arguments().get(key)
    if kind is None:
        close = difflib.get_close_matches(key, [*known_arguments(), *OLD_SPELLINGS, *OWN], n=1)
        fault = tr("{key} is no argument of ms-swift", key=key)
        faults.append(tr("{fault} (did you mean {close}?)", fault=fault, close=close[0]) if close else fault)
        return ""
    allowed = choices().get(key)
    if allowed and not isinstance(value, list) and str(value) not in allowed:
        faults.append(tr("{key}={value} is none of {allowed}", key=key, value=value, allowed=", ".join(allowed)))
    if isinstance(value, str):
        return _from_text(key, kind, value, faults)
    if isinstance(value, list):
        if kind != "list":
            faults.append(tr("{key}={value} is a list, one value is wanted", key=key, value=value))
        return [str(part) for part in value]
    if kind in {"int", "float"}:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            faults.append(tr("{key}={value} is no number", key=key, value=value))
        elif kind == "int" and value != int(value):
            faults.append(tr("{key}={value} is no whole number", key=key, value=value))
    return value if isinstance(value, bool | int | float) else str(value)


def _from_text(key: str, kind: str, value: str, faults: list[str]) -> Value:
    text = value.strip()
    if kind == "bool":
        if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        faults.append(tr("{key}={value} is neither true nor false", key=key, value=value))
    elif kind == "int":
        return _whole_number(key, text, faults)
    elif kind == "float":
        try:
            number = float(text)
        except ValueError:
            faults.append(tr("{key}={value} is no number", key=key, value=value))
        else:
            if not math.isfinite(number):
                faults.append(tr("{key}={value} is not finite", key=key, value=value))
            return number
    elif kind == "list":
        return text.split()
    return value


def _whole_number(key: str, value: object, faults: list[str]) -> int:
    try:
        return int(str(value))
    except ValueError:
        faults.append(tr("{key}={value} is no whole number", key=key, value=value))
        return 0
