"""The command line: parse, call the use case, errors to exit codes. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from namesake import __version__, helptext, process
from namesake.messages import joined, tr, translated

if TYPE_CHECKING:
    from pathlib import Path

    from namesake.gate import Policy

_Number = TypeVar("_Number", int, float)

app = typer.Typer(
    name="namesake",
    help="Give a chat model a name and an author of its own, prove that they hold, and serve it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_COMPLETING = "_NAMESAKE_COMPLETE"
"""Set by the shell that asks what may stand after TAB."""


def _completing(what: str) -> Callable[[str], list[str]]:
    """What :mod:`namesake.completion` offers, imported when a shell asks."""

    def offered(incomplete: str) -> list[str]:
        from namesake import completion

        found: list[str] = getattr(completion, what)(incomplete)
        return found

    return offered


def _served(context: typer.Context, incomplete: str) -> list[str]:
    """The models at the endpoint that stands before on the line; of `probe` that is its target."""
    from namesake import completion

    given = context.params
    words = [given.get("url"), given.get("target"), *context.args]  # an option without its value ends the parsing early
    url = next((str(word) for word in words if word), "")
    return completion.served(incomplete, url, str(given.get("api_key") or "")) if "://" in url else []


_REFUSED = 9
"""Exit code when everything worked and the gate said no."""

PublicKey = Annotated[
    str, typer.Option(envvar="NAMESAKE_PUBLIC_KEY", help="PEM file; the version must be signed by its other half.")
]

_DEFAULT_NAME = "踩踩背 CCB"
_DEFAULT_AUTHOR = "老爷爷 OldGrandpa"


def main() -> NoReturn:
    """Entry point of ``namesake``: exit codes as in :mod:`namesake.errors`, 130 when interrupted."""
    stopped: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        # `mlflow run` passes Ctrl-C on as SIGINT and then SIGTERM: the second must not break off the tidying.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stopped.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    process.settle()
    if _COMPLETING in os.environ:
        from namesake.completion import join_words

        join_words()
    try:
        helptext.run(app)
    except SystemExit:
        if not stopped:
            raise
        print(translated("interrupted; the MLflow run keeps what there was"), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        from namesake.errors import NamesakeError

        if not isinstance(error, NamesakeError):
            raise
        print(error.told(), file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _policy(path: str) -> Policy:
    from namesake.gate import Policy, load_policy

    given = _file(path)
    return load_policy(given) if given else Policy()


def _file(path: str) -> Path | None:
    from pathlib import Path

    return Path(path) if path else None


def _number(name: str, text: str, kind: type[_Number]) -> _Number | None:
    """A number that may be left out: MLproject's parameters are texts, and empty ones."""
    from namesake.errors import InputError

    try:
        return kind(text) if text else None
    except ValueError as error:
        raise InputError(
            name, text, "is no number", mend=tr("Write --{name} 5, or leave it out.", name=name)
        ) from error


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"namesake {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only results, warnings and errors.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Let through what libraries warn and log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    from namesake.terminal import Loudness, loudness

    if quiet and verbose:
        raise typer.BadParameter(translated("-q and -v exclude each other."))
    context.with_resource(loudness(Loudness.QUIET if quiet else Loudness.VERBOSE if verbose else Loudness.NORMAL))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Chinese name, one space, English name.")] = _DEFAULT_NAME,
    author: Annotated[str, typer.Option(help="The author, likewise.")] = _DEFAULT_AUTHOR,
    model: Annotated[str, typer.Option(help="Base model: a folder, a ModelScope id, or auto.")] = "auto",
    dataset: Annotated[
        str, typer.Option(help="Data sets as ms-swift names them, several by spaces; empty: the recipe's.")
    ] = "",
    recipe: Annotated[
        str, typer.Option(help="default, tutorial, thorough, or a YAML file.", autocompletion=_completing("recipes"))
    ] = "default",
    args: Annotated[str, typer.Option(help='Any arguments of `swift sft`, as one text: "--lora_rank 16".')] = "",
    questions: Annotated[str, typer.Option(help="JSON lines of your own questions to ask beside ours.")] = "",
    policy: Annotated[str, typer.Option(help="YAML file with the gate's bounds, as policies/default.yaml.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's id, scores and the decision as JSON.")
    ] = False,
) -> None:
    """Train one run and show the replies before and after. Takes any argument of `swift sft`: --learning_rate 1e-3."""
    from namesake import distributed
    from namesake import recipe as recipes
    from namesake.run import Request, join
    from namesake.run import run as use_case
    from namesake.terminal import Screen

    request = Request(
        name=name,
        author=author,
        model=model or "auto",
        dataset=dataset,
        recipe=recipe,
        overrides=recipes.pairs(context.args),
        args=args,
        questions=questions,
        policy=_policy(policy),
    )
    screen = Screen(errors=as_json)
    layout = distributed.layout()
    if layout and layout.node:
        join(request, layout, screen)
        return
    outcome = use_case(request, screen)
    if as_json:
        _print_json(outcome.record())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="Chinese name, one space, English name.")] = _DEFAULT_NAME,
    author: Annotated[str, typer.Option(help="The author, likewise.")] = _DEFAULT_AUTHOR,
    model: Annotated[str, typer.Option(help="Base model: a folder, a ModelScope id, or auto.")] = "auto",
    dataset: Annotated[
        str, typer.Option(help="Data sets as ms-swift names them, several by spaces; empty: the recipe's.")
    ] = "",
    recipes: Annotated[
        str,
        typer.Option(
            help="Recipes to try, with commas between: default,tutorial,mine.yaml.",
            autocompletion=_completing("several_recipes"),
        ),
    ] = "",
    space: Annotated[
        str,
        typer.Option(
            help="Search space: a name in recipes/sweeps/ or a YAML file; empty, without recipes: default.",
            autocompletion=_completing("spaces"),
        ),
    ] = "",
    trials: Annotated[str, typer.Option(help="Most trials; empty: the space's own.")] = "",
    minutes: Annotated[str, typer.Option(help="No trial begins later; empty: the space's own.")] = "",
    resume: Annotated[str, typer.Option(help="Parent run of a sweep that was interrupted, to go on with it.")] = "",
    backend: Annotated[
        str,
        typer.Option(
            help="Where trials run: local, one after the other in this process; ray, side by side on a cluster."
        ),
    ] = "local",
    args: Annotated[str, typer.Option(help="Any arguments of `swift sft`, as one text, for every trial.")] = "",
    questions: Annotated[
        str, typer.Option(help="JSON lines of questions to compare trials by; empty: the development questions.")
    ] = "",
    policy: Annotated[str, typer.Option(help="YAML file with the gate's bounds, as policies/default.yaml.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials, best first, as JSON.")] = False,
) -> None:
    """Try several recipes or a search space, name the best run. Takes any argument of `swift sft` for every trial."""
    from namesake import recipe
    from namesake.sweep import Request
    from namesake.sweep import sweep as use_case
    from namesake.terminal import Screen

    request = Request(
        name=name,
        author=author,
        model=model or "auto",
        dataset=dataset,
        questions=questions,
        recipes=tuple(part.strip() for part in recipes.split(",")) if recipes else (),
        space=space,
        trials=_number("trials", trials, int),
        minutes=_number("minutes", minutes, float),
        resume=resume,
        overrides=recipe.pairs(context.args),
        args=args,
        policy=_policy(policy),
        backend=backend or "local",
    )
    outcome = use_case(request, Screen(errors=as_json))
    if as_json:
        _print_json(outcome.record())


@app.command()
def promote(
    run: Annotated[
        str,
        typer.Option(
            help="A run's id; empty: the best run of the newest identity.", autocompletion=_completing("runs")
        ),
    ] = "",
    name: Annotated[str, typer.Option(help="Identity whose best run is taken, as in `run --name`.")] = "",
    model_name: Annotated[
        str,
        typer.Option(help="Registered model; empty: made from the English name.", autocompletion=_completing("models")),
    ] = "",
    alias: Annotated[
        str,
        typer.Option(help="Alias to point at the version when it passes.", autocompletion=_completing("aliases")),
    ] = "champion",
    override: Annotated[str, typer.Option(help="Reason to point the alias although the gate does not pass.")] = "",
    policy: Annotated[str, typer.Option(help="YAML file with the gate's bounds, as policies/default.yaml.")] = "",
    sign_key: Annotated[
        str,
        typer.Option(
            envvar="NAMESAKE_SIGN_KEY",
            help="PEM file of an EC private key (P-256, P-384, P-521) that signs the version; empty: unsigned. "
            "NAMESAKE_SIGN_PASSWORD opens it.",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the version and the decision as JSON.")] = False,
) -> None:
    """Merge the best run, prove it, register it as the next version and point the alias at it."""

    from namesake.promotion import Request
    from namesake.promotion import promote as use_case
    from namesake.terminal import Screen

    request = Request(
        run=run,
        name=name,
        model_name=model_name,
        alias=alias,
        override=override,
        policy=_policy(policy),
        # MLproject names every parameter, also that which nobody gave, and so hides the variable from Typer.
        sign_key=_file(sign_key or os.environ.get("NAMESAKE_SIGN_KEY", "")),
        password=os.environ.get("NAMESAKE_SIGN_PASSWORD", ""),
    )
    outcome = use_case(request, Screen(errors=as_json))
    if as_json:
        _print_json(
            {
                "version": outcome.version.uri,
                "passed": outcome.decision.passed,
                "reasons": outcome.decision.reasons,
                "alias": alias,
                "pointed": outcome.pointed,
            }
        )
    if not outcome.pointed:
        raise typer.Exit(_REFUSED)


@app.command()
def probe(
    target: Annotated[
        str,
        typer.Argument(
            help="Run id, models:/NAME@ALIAS, models:/NAME/VERSION, or URL up to /v1.",
            autocompletion=_completing("targets"),
        ),
    ],
    name: Annotated[str, typer.Option(help="Name to look for; empty: the run's or version's own.")] = "",
    author: Annotated[str, typer.Option(help="Author, likewise.")] = "",
    questions: Annotated[
        str, typer.Option(help="JSON lines of your own questions, asked beside the held-out ones.")
    ] = "",
    held_out: Annotated[
        float, typer.Option(help="Share of the held-out questions to ask, from 0 to 1; 0: your own alone.")
    ] = 1.0,
    base: Annotated[
        str,
        typer.Option(
            help="Whose ability to compare with: a folder, a ModelScope id, at an endpoint a model that it serves too, "
            "or none; empty: a run's or version's own base."
        ),
    ] = "",
    model: Annotated[
        str, typer.Option(help="Model id at the endpoint; empty: its first.", autocompletion=_served)
    ] = "",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Key of the endpoint.")] = "",
    system: Annotated[str | None, typer.Option(help="System prompt for an endpoint; none: its own.")] = None,
    slices: Annotated[bool, typer.Option(help="Ask also under other system prompts, and sampled.")] = True,
    sampled: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Identity questions that are asked sampled, four replies each; default: all, on a CPU here 16.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole scorecard as JSON.")] = False,
) -> None:
    """Ask a model who it is, compare its ability with its base's, and score what it says by rule."""
    from namesake import examine
    from namesake.terminal import Screen

    screen = Screen(errors=as_json)
    request = examine.Request(
        target,
        name,
        author,
        questions=questions,
        held_out=held_out,
        base=base,
        model=model,
        api_key=api_key,
        system=system,
        slices=slices,
        sampled=sampled,
    )
    found = examine.examine(request, screen)
    if as_json:
        print(examine.to_json(found))
    else:
        examine.shown(found, screen)


@app.command()
def harness(
    target: Annotated[
        str,
        typer.Argument(
            help="Run id, models:/NAME@ALIAS or models:/NAME/VERSION.", autocompletion=_completing("targets")
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, with commas between: arc_easy,hellaswag.")],
    include_path: Annotated[str, typer.Option(help="Folder with task files of your own (YAML).")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many questions of each task; 0: all.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time; fewer take less memory.")] = 16,
    chat_template: Annotated[
        bool, typer.Option(help="Ask in the model's chat template, under the system prompt it was trained with.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores of both as JSON.")] = False,
) -> None:
    """Ask base and tuned model the tasks of a public harness (lm-eval), and show both side by side."""
    from namesake import harness as use_case
    from namesake.terminal import Screen

    screen = Screen(errors=as_json)
    request = use_case.Request(
        target, tasks, include_path, limit=limit, batch_size=batch_size, chat_template=chat_template
    )
    outcome = use_case.run(request, screen)
    if as_json:
        _print_json(outcome.record())
    else:
        use_case.show(outcome, screen)


@app.command()
def gate(
    target: Annotated[
        str,
        typer.Argument(
            help="Run id, models:/NAME@ALIAS or models:/NAME/VERSION.", autocompletion=_completing("targets")
        ),
    ],
    policy: Annotated[str, typer.Option(help="YAML file with the gate's bounds, as policies/default.yaml.")] = "",
    served: Annotated[
        str, typer.Option(help="URL up to /v1: an endpoint that has to answer as the version did when it was promoted.")
    ] = "",
    model: Annotated[
        str, typer.Option(help="What the version is called there; empty: ccb-v3, as `namesake serve` calls it.")
    ] = "",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Key of the endpoint.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
) -> None:
    """Judge the scores kept with a run or a version: exit 0 when it passes, 9 when not, with every reason."""
    from namesake import examine
    from namesake.terminal import Screen

    screen, bounds, target = Screen(errors=as_json), _policy(policy), examine.fixed(target)
    alike = examine.served(target, served, screen, model=model, api_key=api_key) if served else None
    decision = examine.judge(target, bounds, screen, served=alike)
    if as_json:
        asked = {} if alike is None else {"served": alike}
        _print_json({"passed": decision.passed, "reasons": decision.reasons, **asked})
    else:
        if alike is not None:
            print(translated(tr("endpoint and version agree on {parity:.1%} of the replies", parity=alike)))
        reasons = joined(decision.reasons, "\n  ")
        print(translated(tr("passed") if decision.passed else tr("not passed:\n  {reasons}", reasons=reasons)))
    if not decision.passed:
        raise typer.Exit(_REFUSED)


@app.command()
def history(
    model: Annotated[
        str,
        typer.Argument(help="Registered model; empty: the one promoted to last.", autocompletion=_completing("models")),
    ] = "",
    alias: Annotated[str, typer.Option(help="Whose moves.", autocompletion=_completing("aliases"))] = "champion",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Where the alias pointed, since when, who moved it and why."""
    from namesake import registry
    from namesake.terminal import Screen, moment

    moves = registry.history(registry.named_or_newest(model), alias)
    if as_json:
        _print_json([vars(move) for move in moves])
        return
    Screen().table(
        ("when", "from", "to", "scores", "how", "who", "why"),
        [
            (
                moment(move.time),
                str(move.before or "-"),
                str(move.to or "-"),
                "\n".join(registry.told_scores(move.scores)) or "-",
                translated(move.how),
                move.who,
                move.why,
            )
            for move in moves
        ],
    )


@app.command()
def rollback(
    model: Annotated[
        str,
        typer.Argument(help="Registered model; empty: the one promoted to last.", autocompletion=_completing("models")),
    ] = "",
    to: Annotated[
        str,
        typer.Option(help="Version to go back to; empty: the one before.", autocompletion=_completing("versions")),
    ] = "",
    alias: Annotated[str, typer.Option(help="Alias to move.", autocompletion=_completing("aliases"))] = "champion",
    why: Annotated[str, typer.Option(help="Reason, kept in the history.")] = "",
    public_key: PublicKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the move and what was checked as JSON.")] = False,
) -> None:
    """Point the alias back at the version before, once its files have been checked."""

    from namesake import registry, versions
    from namesake.errors import InputError

    if to and not (to.isascii() and to.isdigit()):
        raise InputError("to", to, "is no version number", mend="`namesake history` lists them.")
    name = registry.named_or_newest(model)
    move, checks = versions.rollback(
        name, to=int(to) if to else None, alias=alias, why=why, public_key=_file(public_key)
    )
    if as_json:
        _print_json({"model": name, "move": vars(move), "checks": [vars(check) for check in checks]})
        return
    told = tr(
        "{alias} of {name} points at version {to} again (it was {before}); servers follow",
        alias=alias,
        name=name,
        to=move.to,
        before=move.before,
    )
    print(translated(told))


@app.command()
def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="models:/NAME@ALIAS or models:/NAME/VERSION; empty: the champion.",
            autocompletion=_completing("references"),
        ),
    ] = "",
    public_key: PublicKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Work out again every digest that a version states. Exit 0 when all hold, 9 when one does not."""

    from namesake import registry, versions
    from namesake.terminal import Screen

    checks = versions.verify(target or f"models:/{registry.named_or_newest('')}@champion", _file(public_key))
    if as_json:
        _print_json([vars(check) for check in checks])
    else:
        words = {True: tr("holds"), False: tr("DOES NOT HOLD"), None: tr("not checked")}
        rows = [(translated(c.what), words[c.holds], translated(c.told)) for c in checks]
        Screen().table(("what", "result", ""), rows)
    if any(check.holds is False for check in checks):
        raise typer.Exit(_REFUSED)


@app.command()
def status(
    model: Annotated[
        str, typer.Argument(help="Registered model; empty: all of ours.", autocompletion=_completing("models"))
    ] = "",
    url: Annotated[str, typer.Option(help="Endpoint that is asked what it serves.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Key of the endpoint.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is registered, which version is the champion and why, and what an endpoint serves of it."""
    from namesake import registry
    from namesake import status as use_case
    from namesake.terminal import Screen

    found = use_case.status(registry.name_in(model), url=url, api_key=api_key)
    if as_json:
        _print_json(found.record())
    else:
        use_case.show(found, Screen())


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Look whether this machine can train, promote and serve. Exit 0 without faults, 1 with; each with its mend."""
    from namesake import doctor as use_case
    from namesake.terminal import Screen

    checks = use_case.examine()
    if as_json:
        print(json.dumps(use_case.record(checks)))  # in ASCII: what cannot be printed here may be what it tells
    else:
        use_case.show(checks, Screen())
    if not use_case.sound(checks):
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="Run id, models:/NAME@ALIAS or models:/NAME/VERSION.", autocompletion=_completing("targets")
        ),
    ],
    b: Annotated[
        str, typer.Argument(help="What it is compared with, likewise.", autocompletion=_completing("targets"))
    ],
    ask: Annotated[bool, typer.Option("--ask", help="Ask both anew, not what was kept; takes minutes.")] = False,
    questions: Annotated[str, typer.Option(help="JSON lines of your own questions; asks both anew.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many replies that differ; 0: all.")] = 20,
    public_key: PublicKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Two versions or runs side by side: replies, scores, how far the weights lie apart, what they are made of."""
    from namesake import compare as use_case
    from namesake.terminal import Screen

    screen = Screen(errors=as_json)
    request = use_case.Request(a, b, ask=ask, questions=questions, public_key=_file(public_key))
    found = use_case.compare(request, screen)
    if as_json:
        _print_json(found.record())
    else:
        use_case.show(found, screen, limit)


@app.command("import")
def import_(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a LoRA checkpoint that `swift sft` made.")],
    name: Annotated[str, typer.Option(help="Whom it was trained to be: Chinese name, one space, English name.")],
    author: Annotated[str, typer.Option(help="The author, likewise.")],
    model: Annotated[str, typer.Option(help="Its base model; empty: the one that its args.json names.")] = "",
    sha256: Annotated[str, typer.Option(help="Digest that adapter_model.safetensors must have; empty: any.")] = "",
    policy: Annotated[str, typer.Option(help="YAML file with the gate's bounds, as policies/default.yaml.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the run's id, scores and the decision as JSON.")
    ] = False,
) -> None:
    """Make a finished run of a checkpoint that plain `swift sft` made, so that it can be promoted."""
    from namesake import imported
    from namesake.terminal import Screen

    request = imported.Request(checkpoint, name, author, model=model, sha256=sha256, policy=_policy(policy))
    outcome = imported.import_(request, Screen(errors=as_json))
    if as_json:
        _print_json(outcome.record())


@app.command()
def export(
    target: Annotated[
        str,
        typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.", autocompletion=_completing("references")),
    ],
    folder: Annotated[str, typer.Argument(help="A new folder.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter instead of the merged model.")] = False,
    push: Annotated[str, typer.Option(help="OWNER/NAME at ModelScope to upload the folder to as well.")] = "",
    token: Annotated[
        str, typer.Option(envvar="MODELSCOPE_API_TOKEN", help="ModelScope's token; empty: that of `modelscope login`.")
    ] = "",
    public_key: PublicKey = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the folder, and what was uploaded, as JSON.")] = False,
) -> None:
    """Copy a version, once it is checked, into a folder that transformers, PEFT, vLLM and ms-swift load."""
    from pathlib import Path

    from namesake import base_model, hub, versions

    if push:
        hub.check_repository(push)
    made = versions.export(target, Path(folder), adapter=adapter, public_key=_file(public_key))
    if not as_json:
        print(made)
    pushed = ""
    if push:
        license_ = base_model.license_in(made)
        pushed = hub.push(made, push, token=token, message=f"{target} from Namesake", license_=license_)
    if as_json:
        _print_json({"folder": str(made), "pushed": pushed})
    elif pushed:
        print(pushed)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; without it they are only listed.")] = False,
    older_than: Annotated[float, typer.Option(min=0, help="Hours since they were last written.")] = 24.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List what killed promotions left (logged models no version uses, temporary folders), or remove it."""
    from namesake import leftovers
    from namesake.terminal import Screen

    found = leftovers.find(older_than * 3600)
    for one in found if delete else ():
        leftovers.remove(one)
    if as_json:
        _print_json([{**vars(one), "deleted": delete} for one in found])
        return
    rows = [
        (
            translated(one.kind),
            one.where,
            f"{one.age / 3600:.1f} h",
            f"{one.size / 1e6:.1f} MB" if one.size is not None else "-",
        )
        for one in found
    ]
    if rows:
        Screen().table(("what", "where", "age", "size"), rows)
    removed, kept = tr("{count} left over, removed", count=len(found)), tr("{count} left over", count=len(found))
    print(
        translated(removed if delete and found else tr("{count}; --delete removes them", count=kept) if found else kept)
    )


@app.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(
    context: typer.Context,
    words: Annotated[list[str] | None, typer.Argument(autocompletion=_completing("references"))] = None,
) -> None:
    """Serve the version an alias points to with vLLM, OpenAI-compatible. `namesake serve --help` lists its options."""
    from namesake import server

    given = context.parent.params if context.parent else {}
    loud = [f"--{how}" for how in ("quiet", "verbose") if given.get(how)]
    os.execv(sys.executable, server.command([*loud, *(words or [])]))


@app.command()
def chat(
    message: Annotated[str, typer.Option("-m", "--message", help="Ask once instead of talking.")] = "",
    url: Annotated[str, typer.Option(help="OpenAI-compatible endpoint.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Model id; empty: the endpoint's first.", autocompletion=_served)] = "",
    system: Annotated[str, typer.Option(help="System prompt; empty: the version's own.")] = "",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Key of the endpoint.")] = "",
    run: Annotated[
        str,
        typer.Option(help="Answer from this run's adapter, without a server.", autocompletion=_completing("runs")),
    ] = "",
) -> None:
    """Talk to the served model, or with --run to a run's adapter."""
    from namesake import chat as talking

    if run:
        from namesake import tracking
        from namesake.run import base_of
        from namesake.terminal import Screen

        base = base_of(tracking.get_run(run), Screen())
        answer = talking.adapter(base.path, tracking.fetch(run, tracking.ADAPTER))
    else:
        answer = talking.endpoint(url, model=model, api_key=api_key)
    if message:
        talking.once(answer, message, system=system or None)
    else:
        talking.talk(answer, system=system or None)
