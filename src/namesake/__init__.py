"""Namesake gives a chat model a name and an author of its own, proves that they hold, and ships it.

    import namesake

    trained = namesake.train("踩踩背 CCB", "老爷爷 OldGrandpa")
    namesake.promote(trained.run_id)
    with namesake.serve() as server:
        ...  # any OpenAI client at server.base_url

Errors are those of :mod:`namesake.errors`. Modules that are not named here may change with each release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from namesake import errors as errors
    from namesake.api import (
        ProbeOutcome,
        PromoteOutcome,
        Registry,
        TrainOutcome,
        load_recipe,
        probe,
        promote,
        serve,
        train,
    )
    from namesake.errors import InputError, NamesakeError
    from namesake.gate import Decision, Interval, Policy
    from namesake.identity import Identity
    from namesake.manifest import Manifest
    from namesake.probing import Answered, Scorecard
    from namesake.recipe import Recipe, Replay
    from namesake.registry import Move, Version
    from namesake.server import Server
    from namesake.versions import Check

__version__ = "0.1.0"

_HOME = {
    "namesake.api": (
        *("train", "probe", "promote", "serve", "Registry", "load_recipe"),
        *("TrainOutcome", "ProbeOutcome", "PromoteOutcome"),
    ),
    "namesake.errors": ("NamesakeError", "InputError"),
    "namesake.gate": ("Decision", "Interval", "Policy"),
    "namesake.identity": ("Identity",),
    "namesake.manifest": ("Manifest",),
    "namesake.probing": ("Answered", "Scorecard"),
    "namesake.recipe": ("Recipe", "Replay"),
    "namesake.registry": ("Move", "Version"),
    "namesake.server": ("Server",),
    "namesake.versions": ("Check",),
}

__all__ = [
    "Answered",
    "Check",
    "Decision",
    "Identity",
    "InputError",
    "Interval",
    "Manifest",
    "Move",
    "NamesakeError",
    "Policy",
    "ProbeOutcome",
    "PromoteOutcome",
    "Recipe",
    "Registry",
    "Replay",
    "Scorecard",
    "Server",
    "TrainOutcome",
    "Version",
    "load_recipe",
    "probe",
    "promote",
    "serve",
    "train",
]


if not TYPE_CHECKING:  # else a name that is not there would be no error to a type checker

    def __getattr__(name: str) -> Any:
        # Loaded when first asked for (PEP 562), so that `namesake --help` and `import namesake` cost nothing.
        from importlib import import_module

        if name == "errors":
            return import_module("namesake.errors")
        for module, names in _HOME.items():
            if name in names:
                found = globals()[name] = getattr(import_module(module), name)
                return found
        raise AttributeError(f"module 'namesake' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
