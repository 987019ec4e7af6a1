"""What ``import namesake`` offers: each function is the use case that the command of its name calls, by the command's
own words. Nothing is decided here.

Progress and results go to standard output, as in a terminal; in a notebook, into the cell. Where MLflow keeps runs and
versions is MLflow's own business: ``MLFLOW_TRACKING_URI`` or ``mlflow.set_tracking_uri``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from namesake import base_model, examine, gate, process, promotion, recipe, registry, run, versions
from namesake.examine import Outcome as ProbeOutcome
from namesake.gate import Policy
from namesake.manifest import ADAPTER_FOLDER, WEIGHTS_FOLDER, Manifest
from namesake.promotion import Outcome as PromoteOutcome
from namesake.recipe import Recipe
from namesake.registry import CHAMPION, Move, Version
from namesake.run import Outcome as TrainOutcome
from namesake.server import Option, Server
from namesake.terminal import Loudness, Screen, loudness
from namesake.versions import Check

__all__ = [
    "ProbeOutcome",
    "PromoteOutcome",
    "Registry",
    "TrainOutcome",
    "load_recipe",
    "probe",
    "promote",
    "serve",
    "train",
]

File = str | os.PathLike[str]
Argument = str | int | float | bool | Sequence[str]
"""A value of an argument of ``swift sft``."""


def train(
    name: str,
    author: str,
    *,
    model: File = base_model.AUTO,
    dataset: str | Sequence[str] = "",
    recipe: File | Recipe = "default",
    args: str = "",
    questions: File = "",
    policy: File | Policy | None = None,
    quiet: bool = False,
    **overrides: Argument,
) -> TrainOutcome:
    """Train one run and compare the replies before and after: ``namesake run``.

    Args:
        name: Chinese name, one space, English name: ``踩踩背 CCB``.
        author: the author, likewise.
        model: base model: a folder, a ModelScope id, or ``auto``.
        dataset: data sets as ms-swift names them; empty: the recipe's.
        recipe: ``default``, ``tutorial``, ``thorough``, a YAML file, or a :class:`namesake.Recipe`.
        args: arguments of ``swift sft`` as one text: ``--lora_rank 16``.
        questions: JSON lines of your own questions to ask beside ours.
        policy: the gate's bounds, or a YAML file with them.
        quiet: print only results, warnings and errors.
        overrides: any argument of ``swift sft`` by its name, ``learning_rate=1e-3``; ``replay`` is the number of
            replay prompts.

    Raises:
        InputError: a value is refused; nothing has been trained or written then.
        BaseModelError, TrainingError, TrackingError: the stage that failed; the run is FAILED and keeps what there was.
    """
    process.settle()
    request = run.Request(
        name=name,
        author=author,
        model=os.fspath(model),
        dataset=dataset if isinstance(dataset, str) else " ".join(dataset),
        recipe=recipe if isinstance(recipe, Recipe) else os.fspath(recipe),
        overrides={key: _word(value) for key, value in overrides.items()},
        args=args,
        questions=os.fspath(questions),
        policy=_policy(policy),
    )
    with _loudness(quiet):
        return run.run(request, Screen())


def probe(
    target: str,
    *,
    name: str = "",
    author: str = "",
    questions: File = "",
    held_out: float = 1.0,
    base: File = "",
    model: str = "",
    api_key: str = "",
    system: str | None = None,
    slices: bool = True,
    sampled: int | None = None,
    quiet: bool = False,
) -> ProbeOutcome:
    """Ask a model who it is, compare its ability with its base's, and score what it says by rule: ``namesake probe``.

    Args:
        target: a run's id, ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a URL up to ``/v1``.
        name: name to look for; empty: the run's or version's own. An endpoint needs it.
        author: author, likewise.
        questions: JSON lines of your own questions, asked beside the held-out ones.
        held_out: share of the held-out questions to ask, from 0 to 1; 0: your own alone.
        base: whose ability to compare with: a folder, a ModelScope id, at an endpoint a model that it serves too, or
            ``none``; empty: a run's or version's own base.
        model: model id at the endpoint; empty: its first.
        api_key: key of the endpoint.
        system: system prompt for an endpoint; none: its own.
        slices: ask also under other system prompts, and sampled.
        sampled: so many identity questions are asked sampled, four replies each; none for all, on a CPU here for 16.
        quiet: print no progress.

    Raises:
        InputError: the target is none, or the identity of an endpoint is not given.
        RegistryError, TrackingError, BaseModelError, ServingError: it cannot be had or does not answer.
    """
    process.settle()
    request = examine.Request(
        target,
        name,
        author,
        questions=os.fspath(questions),
        held_out=held_out,
        base=os.fspath(base),
        model=model,
        api_key=api_key,
        system=system,
        slices=slices,
        sampled=sampled,
    )
    with _loudness(quiet):
        return examine.examine(request, Screen())


def promote(
    run: str = "",
    *,
    name: str = "",
    model_name: str = "",
    alias: str = CHAMPION,
    override: str = "",
    policy: File | Policy | None = None,
    sign_key: File | None = None,
    sign_password: str = "",
    quiet: bool = False,
) -> PromoteOutcome:
    """Merge the best run, prove it, register it as the next version and point the alias at it: ``namesake promote``.

    A gate that does not pass is no error: the version is there, ``pointed`` of the outcome is false, its decision says
    why.

    Args:
        run: a run's id; empty: the best run of the newest identity.
        name: identity whose best run is taken, as in :func:`train`.
        model_name: registered model; empty: made from the English name.
        alias: alias to point at the version when it passes.
        override: reason to point the alias although the gate does not pass.
        policy: the gate's bounds, or a YAML file with them.
        sign_key: PEM file of an EC private key that signs the version; none: ``NAMESAKE_SIGN_KEY``'s, else unsigned.
        sign_password: what opens the key; empty: ``NAMESAKE_SIGN_PASSWORD``.
        quiet: print only results, warnings and errors.

    Raises:
        InputError: the key is none that can sign, or another value is refused.
        PromotionError: there is no run to promote, the registered model stands for another identity, or the artifact
            store did not keep what it was given.
        BaseModelError: the base that the run was trained on cannot be had here.
        RegistryError, TrackingError: MLflow failed; nothing half made is left in the registry.
    """
    process.settle()
    request = promotion.Request(
        run=run,
        name=name,
        model_name=model_name,
        alias=alias,
        override=override,
        policy=_policy(policy),
        sign_key=_path(sign_key, "NAMESAKE_SIGN_KEY"),
        password=sign_password or os.environ.get("NAMESAKE_SIGN_PASSWORD", ""),
    )
    with _loudness(quiet):
        return promotion.promote(request, Screen())


def serve(version: str = "", *, host: str = "127.0.0.1", port: int = 8000, **options: Option) -> Server:
    """Serve the version an alias points to, and follow the alias: ``namesake serve``, as a process of its own.

        with namesake.serve("models:/ccb@champion") as server:
            client = openai.OpenAI(base_url=server.base_url, api_key="none")

    Returns at once; the context manager, or :meth:`namesake.Server.wait_ready`, waits until a version answers.

    Args:
        version: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; empty: the newest model's champion.
        host: address to listen on.
        port: port to listen on; 0: a free one.
        options: any other option of ``namesake serve`` by its name: ``eager=True``, ``poll_seconds=0.5``,
            ``engine_arg=["--dtype=float32"]``. One that it does not know is refused when the server is waited for.
    """
    process.settle()
    return Server(version, host=host, port=port, **options)


class Registry:
    """A registered model: its versions, where its aliases point and pointed, and the way back.

    A version is given as its number, an alias, ``models:/…``, or a :class:`namesake.Version`.

    Attributes:
        name: the registered model's name, ``ccb``.
    """

    def __init__(self, model: str = "") -> None:
        """
        Args:
            model: registered model, ``ccb`` or ``models:/ccb``; empty: the one promoted to last.

        Raises:
            RegistryError: there is no such model, or none at all.
        """
        process.settle()
        self.name = registry.named_or_newest(model)
        self.aliases()  # at once, rather than with the first thing that is asked

    def versions(self, most: int = 100) -> list[Version]:
        """The last versions, newest first."""
        return registry.newest_versions(self.name, most)

    def version(self, version: int | str | Version = CHAMPION) -> Version:
        """One version.

        Raises:
            RegistryError: there is no such version or alias.
        """
        return registry.resolve(self._uri(version))

    def aliases(self) -> dict[str, int]:
        """The version's number of each alias."""
        return registry.aliases(self.name)

    def champion(self) -> Version | None:
        """The version that is served; none where the alias ``champion`` points nowhere."""
        return self.version() if CHAMPION in self.aliases() else None

    def manifest(self, version: int | str | Version = CHAMPION) -> Manifest:
        """What a version was made of, and what it scored.

        Raises:
            RegistryError: there is no such version, or it is none of ours.
        """
        return Manifest.read(registry.fetch(self.version(version)))

    def history(self, alias: str = CHAMPION) -> list[Move]:
        """The moves of an alias, oldest first: ``namesake history``."""
        return registry.history(self.name, alias)

    def rollback(
        self, to: int | None = None, *, alias: str = CHAMPION, why: str = "", public_key: File | None = None
    ) -> Move:
        """Point the alias back at the version before, or at ``to``, once its files are checked: ``namesake rollback``.

        Raises:
            PromotionError: there is nothing to go back to, or that version is damaged or never passed the gate.
        """
        move, _ = versions.rollback(self.name, to=to, alias=alias, why=why, public_key=_public(public_key))
        return move

    def verify(self, version: int | str | Version = CHAMPION, *, public_key: File | None = None) -> list[Check]:
        """Work out again every digest that a version states: ``namesake verify``. Each check says whether it holds."""
        return versions.verify(self._uri(version), _public(public_key))

    def load(
        self, version: int | str | Version = CHAMPION, *, adapter: bool = False, public_key: File | None = None
    ) -> Path:
        """A folder for ``from_pretrained``: the merged model, or the adapter, once every file is checked. It may be
        the store's own: nothing may be changed in it.

        Raises:
            PromotionError: the version is damaged or not signed by the key.
        """
        folder = versions.checked(self.version(version), _public(public_key))
        return folder / (ADAPTER_FOLDER if adapter else WEIGHTS_FOLDER)

    def export(
        self,
        folder: File,
        version: int | str | Version = CHAMPION,
        *,
        adapter: bool = False,
        public_key: File | None = None,
    ) -> Path:
        """Copy the same into a new folder: ``namesake export``.

        Raises:
            InputError: the folder is there already.
            PromotionError: the version is damaged or not signed by the key; nothing is written.
        """
        return versions.export(self._uri(version), Path(folder), adapter=adapter, public_key=_public(public_key))

    def __repr__(self) -> str:
        return f"Registry({self.name!r})"

    def _uri(self, version: int | str | Version) -> str:
        if isinstance(version, Version):
            return version.uri
        text = str(version)
        if text.startswith("models:/"):
            return text
        return f"models:/{self.name}/{text}" if text.isdecimal() else f"models:/{self.name}@{text}"


def load_recipe(name: File | Recipe = "default", **overrides: Argument) -> Recipe:
    """A shipped recipe, a YAML file or a recipe made in Python, checked, with the overrides laid over it.

    Raises:
        RecipeError: with every fault of the recipe and of the overrides.
    """
    return recipe.load(
        name if isinstance(name, Recipe) else os.fspath(name),
        overrides={key: _word(value) for key, value in overrides.items()},
    )


def _policy(given: File | Policy | None) -> Policy:
    if isinstance(given, Policy):
        return given
    return gate.load_policy(given) if given else Policy()


def _path(given: File | None, variable: str) -> Path | None:
    found = given or os.environ.get(variable)
    return Path(found) if found else None


def _public(given: File | None) -> Path | None:
    return _path(given, "NAMESAKE_PUBLIC_KEY")


def _word(value: Argument) -> str:
    """A value as the command line has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, str | int | float) else " ".join(value)


def _loudness(quiet: bool) -> AbstractContextManager[None]:
    return loudness(Loudness.QUIET) if quiet else nullcontext()
