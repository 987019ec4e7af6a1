"""The use case ``namesake run``: train one run, and show what changed.

identity and recipe → base model → data and replay → ms-swift → probe, all in one MLflow run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

from namesake import base_model, corpus, dataset, distributed, gate, probing, recipe, replay, report, tracking, training
from namesake.base_model import BaseModel
from namesake.corpus import Questions
from namesake.distributed import Layout
from namesake.errors import BaseModelError, DataError, InputError, Stopped
from namesake.gate import Decision, Interval, Policy
from namesake.generate import LocalModel, divergence, token_counts
from namesake.identity import Identity
from namesake.messages import joined, tr, translated
from namesake.paths import cache_folder, temporary, write_whole
from namesake.probing import Scorecard
from namesake.process import multiplies_bf16
from namesake.recipe import Recipe
from namesake.terminal import Bar, Screen, padded

SHOWN_QUESTIONS = 6
"""Rows of the table of before and after; the two questions of the tutorial come first."""

KL_REPLIES = 36
"""Replies to plain questions, taken at even distances, on which the divergence from the base is measured."""

SHOWN_CHARACTERS = 120
"""Where the table cuts a reply; the run has all of it."""

REPORT = "report.html"
"""Artifact of a training run: the page of :mod:`namesake.report`."""

PLOTS = "plots"
"""Artifact folder of a training run that holds the plots of :mod:`namesake.report`."""

COLUMNS = {
    **dict.fromkeys((f"metrics.`probe/{key}`" for key in ("identity", "leak", "plain")), 120),
    f"tags.`{tracking.TAG_GATE}`": 260,
    f"tags.`{tracking.TAG_BASE}`": 270,
    "params.`recipe.name`": 110,
    "metrics.`eval/loss`": 110,
}
"""What MLflow's list of runs shows of each, and how wide."""

BEST_BY = "metrics.`probe/identity`"

DEV_SCORE = "dev/score"
"""Metric of a watched run: :func:`namesake.probing.objective` on the development questions."""

Losses = dict[str, list[tuple[int, float]]]
"""Step and value of each loss by its metric's name."""

_TOOLS = ("ms-swift", "mlflow", "torch", "transformers", "peft", "modelscope")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "args.json", "additional_config.json")


@dataclass(frozen=True)
class Request:
    """What the user asked for, unchecked."""

    name: str
    author: str
    model: str = base_model.AUTO
    dataset: str = ""
    recipe: str | Recipe = "default"
    overrides: Mapping[str, str] = field(default_factory=dict)
    args: str = ""
    questions: str = ""
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        run_id: its id in MLflow.
        before, after: what the base and the tuned model said, and their scores.
        decision: the gate's; a promotion judges the merged model again.
        development: the tuned model's scores on the development questions; empty for a run that is not watched.
    """

    run_id: str
    before: Scorecard
    after: Scorecard
    decision: Decision
    development: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """As it goes into JSON."""
        return {
            "run": self.run_id,
            "before": self.before.metrics,
            "after": self.after.metrics,
            "passed": self.decision.passed,
            "reasons": self.decision.reasons,
        }

    def compared(self) -> list[tuple[str, str, str]]:
        """Each identity question, the base's reply and the tuned model's."""
        return compared(self.before, self.after)


class Watch(Protocol):
    """Looks at a run while it trains, by development questions and never by the held-out ones.

    Attributes:
        questions: identity questions and plain ones.
        parent: id of the run that the watched one is nested under.
        title: what the run is called.
        tags: tags of the run.
        at: fractions of the training after which it is looked at, each greater than 0 and less than 1.
    """

    questions: Questions
    parent: str
    title: str
    tags: Mapping[str, str]
    at: Sequence[float]

    def begun(self, run_id: str) -> None:
        """The run is there."""

    def go_on(self, fraction: float, score: float) -> bool:
        """Told :func:`namesake.probing.objective` on a few of the questions; whether the training goes on."""
        ...


LOOKED_AT = 32
"""Identity questions, and as many plain ones, taken at even distances, that a look at a training run asks."""


def run(request: Request, screen: Screen, watch: Watch | None = None) -> Outcome:
    """Train one run under MLflow and print the replies before and after; a watched one prints no replies.

    Raises:
        Stopped: the watch did not let it go on.
        InputError: a value of the request is refused; nothing has been trained or written then.
        BaseModelError, TrainingError, TrackingError: the stage that failed; the run is FAILED and keeps what there was.
    """
    identity = Identity.parse(request.name, request.author)
    plan = recipe.load(request.recipe, overrides=request.overrides, args=request.args)
    datasets = tuple(request.dataset.split()) or plan.dataset or (dataset.BUILTIN,)
    own = corpus.read_questions(Path(request.questions)) if request.questions else None
    layout = distributed.layout()
    _check(layout, plan, watch)
    plan = _fitting(plan, request, screen)  # may import torch: after all that can be refused without
    started = time.monotonic()
    title = watch.title if watch else f"{identity.name} · {plan.name} · seed {plan.sft.get('seed', 42)}"
    with tracking.run(title, parent=watch.parent if watch else "") as tracked:
        if watch:
            watch.begun(tracked.id)
            tracked.tags(watch.tags)
        tracked.tags(
            {
                tracking.TAG_KIND: "train",
                tracking.TAG_SLUG: identity.slug,
                tracking.TAG_NAME: str(identity.name),
                tracking.TAG_AUTHOR: str(identity.author),
            }
        )
        screen.step(tr("run {title}", title=title))
        base = base_model.resolve(request.model, say=screen.detail)
        if base.note:
            screen.warn(base.note)
        base_digest = base.digest()
        work = Path(str(plan.sft.get("output_dir", "output"))).resolve() / "runs" / tracked.id
        processes = layout.processes if layout else 1
        prepared = _prepare(identity, plan, datasets, base, base_digest, work, tracked, screen, processes)
        params = {
            **_params(identity, plan, datasets, base, base_digest, prepared),
            "train.processes": processes,
        }
        tracked.params(params)
        tracked.tags({tracking.TAG_BASE: base.id, tracking.TAG_SOURCE: base.source})
        _log_data(tracked, prepared, datasets)
        asked = corpus.heldout(plan.held_out)
        before = base_scores(identity, base, base_digest, plan.system, asked, screen)
        look = _Look(watch, identity, base, base_digest, plan.system, tracked, screen) if watch else None

        screen.step("training")
        trained, losses = _train(plan, base, base_digest, prepared, work, tracked, screen, look, layout)

        after, decision, development = prove(
            tracked,
            identity,
            base,
            trained.last_checkpoint,
            before,
            title=title,
            system=plan.system,
            params=params,
            losses=losses,
            policy=request.policy,
            held_out=plan.held_out,
            own=own,
            look=look,
            screen=screen,
        )
        tracked.metrics({"seconds/total": time.monotonic() - started})
    outcome = Outcome(tracked.id, before, after, decision, development)
    if not watch:
        show(tracked, before, after, decision, screen)
    return outcome


def _fitting(plan: Recipe, request: Request, screen: Screen) -> Recipe:
    """The recipe in float32 where the processor is slow at bfloat16, unless that was asked for on the command line."""
    if multiplies_bf16() or _has_gpu():
        return plan
    asked = {**recipe.parse_args(request.args), **request.overrides}
    given = {"torch_dtype": "bfloat16", **plan.sft}  # what most models come in
    changed = {
        key: "float32" for key in ("torch_dtype", "lora_dtype") if given.get(key) == "bfloat16" and key not in asked
    }
    if changed:
        screen.warn(
            "This processor has no AVX-512, so it trains in float32; -P torch_dtype=bfloat16 would take far longer."
        )
    return replace(plan, sft={**plan.sft, **changed})


def _check(layout: Layout | None, plan: Recipe, watch: Watch | None) -> None:
    """Whether what is asked for can be done in these processes."""
    if layout and watch and layout.nodes > 1:
        raise InputError(
            distributed.NODES, layout.nodes, "the trials of a sweep train on one node", mend="Leave it out."
        )
    if layout and layout.node:
        raise InputError(
            distributed.NODE,
            layout.node,
            "only node 0 writes a run",
            mend="Call `namesake run` with the same arguments on this node.",
        )
    for key in ("deepspeed", "fsdp"):
        if plan.sft.get(key) and watch and watch.at:
            raise InputError(
                key,
                plan.sft[key],
                "a model that is spread over processes cannot be looked at while it trains",
                mend="Write prune: false in the search space.",
            )


def join(request: Request, layout: Layout, screen: Screen) -> None:
    """Train as one of the nodes that node 0 leads. The run is node 0's, and so are data, recipe and the log of metrics.

    Raises:
        InputError, BaseModelError, TrainingError: as in :func:`run`.
    """
    if os.environ.get("MLFLOW_RUN_ID"):
        raise InputError(
            distributed.NODE,
            layout.node,
            "only node 0 writes a run, and `mlflow run` has begun one here",
            mend="Call `namesake run` with the same arguments on this node.",
        )
    plan = recipe.load(request.recipe, overrides=request.overrides, args=request.args)
    base = base_model.resolve(request.model, say=screen.detail)
    log = Path(str(plan.sft.get("output_dir", "output"))).resolve() / "nodes" / str(layout.node) / "train.log"
    log.unlink(missing_ok=True)
    screen.step(tr("node {node} of {nodes}: trains when node 0 does", node=layout.node, nodes=layout.nodes))
    distributed.join(layout, base.path, base.digest(), log)
    screen.result("  trained; the run is on node 0")


class _Look:
    """Asks the development questions: a few while it trains, all of them when it has."""

    def __init__(
        self,
        watch: Watch,
        identity: Identity,
        base: BaseModel,
        base_digest: str,
        system: str | None,
        tracked: tracking.Run,
        screen: Screen,
    ) -> None:
        who, plain = watch.questions.identity, watch.questions.plain
        self._few = Questions(tuple(corpus.spread(who, LOOKED_AT)), tuple(corpus.spread(plain, LOOKED_AT)))
        self._watch, self._identity, self._base, self._system = watch, identity, base, system
        self._tracked = tracked
        # Of the base only the plain answers count.
        self._before = base_scores(identity, base, base_digest, system, Questions((), plain), screen)
        self._before_few = Scorecard((), tuple(corpus.spread(self._before.plain, LOOKED_AT)))
        self.at = watch.at

    def __call__(self, fraction: float, step: int, adapter: Path) -> None:
        with LocalModel(self._base.path, adapter, folded=True) as model:
            card = probing.probe(model, self._identity, system=self._system, questions=self._few)
        score = probing.objective(self._before_few, card)
        self._tracked.metrics({"early/score": score, **_development("early", card)}, step)
        if not self._watch.go_on(fraction, score):
            raise Stopped("pruned")

    def ask_all(self, model: LocalModel, progress: Callable[[int, int], None]) -> dict[str, float]:
        asked = self._watch.questions
        card = probing.probe(model, self._identity, system=self._system, questions=asked, progress=progress)
        found = {DEV_SCORE: probing.objective(self._before, card), **_development("dev", card)}
        self._tracked.metrics(found)
        return {key.removeprefix("dev/"): value for key, value in found.items()}


def _development(prefix: str, card: Scorecard) -> dict[str, float]:
    return {f"{prefix}/{key}": card.metrics[key] for key in ("identity", "swapped", "leak", "plain")}


def prove(
    tracked: tracking.Run,
    identity: Identity,
    base: BaseModel,
    adapter: Path,
    before: Scorecard,
    *,
    title: str,
    system: str | None,
    params: Mapping[str, object],
    losses: Losses,
    policy: Policy,
    screen: Screen,
    held_out: float = 1.0,
    own: Questions | None = None,
    look: _Look | None = None,
) -> tuple[Scorecard, Decision, dict[str, float]]:
    """Ask the tuned model, judge what it says, and log both with the report.

    Args:
        params: what the run logged of how it was made; for the report.
        held_out: share of the held-out questions that are asked, and were asked of the base.
        own: the user's own questions, asked beside ours.
        look: asks the development questions of a watched run.

    Returns:
        The scorecard, the gate's decision, and the scores on the development questions; these empty without ``look``.
    """
    screen.step("asking the tuned model")
    with LocalModel(base.path, adapter, folded=True) as model, screen.bar("probe", 1) as bar:
        asked = corpus.heldout(held_out)
        after = probing.probe(model, identity, system=system, questions=asked, slices=True, progress=progress_of(bar))
        if own is not None:
            _log_own(tracked, probing.probe(model, identity, system=system, questions=own), screen)
        development = look.ask_all(model, progress_of(bar)) if look else {}
    ability = ability_of(before, after)
    decision = gate.decide(after.metrics, ability, held_out=held_out, policy=policy)
    tracked.params({"probe.questions": asked.digest()})
    tracked.metrics({"probe/held_out": held_out})
    tracked.metrics({"probe/kl_to_base": kl_to_base(base, adapter, system, before)})
    _log_scores(tracked, before, after, ability, decision)
    _log_report(
        tracked,
        report.Report(
            name=str(identity.name),
            author=str(identity.author),
            run=tracked.id,
            title=title,
            passed=decision.passed,
            reasons=decision.reasons,
            before=before.record(),
            after=after.record(),
            losses=losses,
            recipe={k: str(v) for k, v in params.items() if k.startswith(("recipe.", "sft.")) and v is not None},
            lineage={
                k: str(v) for k, v in params.items() if k.startswith(("base.", "data.", "tool.")) and v is not None
            },
        ),
    )
    note = _note(tracked, identity, str(params["recipe.name"]), base, before, after, decision)
    tracked.tags({tracking.TAG_NOTE: note})
    tracked.shared_view(COLUMNS, best_by=BEST_BY)
    return after, decision, development


def base_scores(
    identity: Identity, base: BaseModel, base_digest: str, system: str | None, questions: Questions, screen: Screen
) -> Scorecard:
    """The base model's scorecard. Its replies are the same for every identity and are asked for once."""
    asked = [base_digest, system, questions.digest(), probing.IDENTITY_TOKENS, probing.PLAIN_TOKENS]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
    path = cache_folder() / "probe" / f"{key}.json"
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))
        return probing.scorecard(identity, said["identity"], said["plain"], questions=questions)
    screen.step("asking the base model (once, kept for later runs)")
    with LocalModel(base.path) as model, screen.bar("probe", 1) as bar:
        card = probing.probe(model, identity, system=system, questions=questions, progress=progress_of(bar))
    write_whole(path, json.dumps(card.replies(), ensure_ascii=False))
    return card


def base_of(run: tracking.RunRecord, screen: Screen) -> BaseModel:
    """The base model that the run was trained on, on this machine.

    Raises:
        BaseModelError: it is not to be had here, or it is another one under the same name.
    """
    return same_base(run.params["base.id"], run.tags.get(tracking.TAG_SOURCE, ""), run.params["base.digest"], screen)


def same_base(base_id: str, source: str, digest: str, screen: Screen) -> BaseModel:
    """The base model that something was trained on, as that keeps it, on this machine.

    Raises:
        BaseModelError: it is not to be had here, or it is another one under the same name.
    """
    if source == "embedded":
        base = BaseModel(base_id, base_model.embedded(screen.detail), "embedded")
    else:
        base = base_model.resolve(base_id, say=screen.detail)
    if base.digest() != digest:
        raise BaseModelError(
            tr("{base_id} here is not the base that was trained on (its digest differs).", base_id=base_id),
            mend="Bring back the base's files, or train again.",
        )
    return base


def ability_of(before: Scorecard, after: Scorecard) -> Interval:
    """The paired change of the plain score."""
    return gate.paired_difference([a.scores["right"] for a in before.plain], [a.scores["right"] for a in after.plain])


def kl_to_base(base: BaseModel, tuned: Path, system: str | None, before: Scorecard) -> float:
    """How far the tuned model is from its base on the base's own replies to the plain questions, in nats a token.

    Args:
        tuned: folder of an adapter or of weights.
        system: what both are asked under.
    """
    return divergence(
        base.path,
        tuned,
        [
            [*probing.with_system(a.question.messages, system), {"role": "assistant", "content": a.reply}]
            for a in before.plain[:: max(len(before.plain) // KL_REPLIES, 1)]
        ],
    )


_OWN = (("identity", "identity", "right"), ("plain", "plain", "right"), ("leak", "plain", "leak"))
"""Scores of the user's own questions: their name, the replies they are about, and what counts there."""


def own_metrics(card: Scorecard) -> dict[str, float]:
    """The scores of the user's own questions, as far as there are some of the kind."""
    return {key: card.metrics[key] for key, kind, _ in _OWN if getattr(card, kind)}


def show_own(card: Scorecard, screen: Screen) -> None:
    """The same on the terminal, as numbers."""
    for key, kind, score in _OWN:
        if asked := getattr(card, kind):
            right = sum(a.scores[score] for a in asked)
            screen.result(tr("  your questions: {key} {right} of {asked}", key=key, right=right, asked=len(asked)))


def _log_own(tracked: tracking.Run, card: Scorecard, screen: Screen) -> None:
    """What the tuned model says to the user's own questions."""
    tracked.json(card.record(), "scorecard-own.json")
    tracked.metrics({f"own/{key}": value for key, value in own_metrics(card).items()})
    show_own(card, screen)


def _prepare(
    identity: Identity,
    plan: Recipe,
    datasets: tuple[str, ...],
    base: BaseModel,
    base_digest: str,
    work: Path,
    tracked: tracking.Run,
    screen: Screen,
    processes: int = 1,
) -> dataset.Prepared:
    told = tr("data: {names} and {count} replay prompts", names=" ".join(datasets), count=plan.replay.prompts)
    screen.step(told if plan.replay.prompts else tr("data: {names}", names=" ".join(datasets)))
    builtin = str(dataset.write_builtin(work))
    named = [one.replace(dataset.BUILTIN, builtin, 1) if one.startswith(dataset.BUILTIN) else one for one in datasets]
    seed = int(str(plan.sft.get("data_seed", 42)))
    rows = training.load_rows(named, seed=seed)
    dialogues, with_names = dataset.fill(rows, identity)
    if left_out := len(rows) - len(dialogues):
        told = tr(
            "{count} rows ask what the probe asks: they are left out, or its scores would say nothing", count=left_out
        )
        screen.warn(told)
    if not dialogues:
        raise DataError(
            "dataset", " ".join(datasets), "every row asks what the probe asks", mend="Give rows that ask otherwise."
        )
    if not with_names:
        screen.warn("no row has {{NAME}} or {{AUTHOR}}: this run teaches no identity")
    dialogues = [_under(corpus.system_of(n, plan.other_systems), one) for n, one in enumerate(dialogues)]
    replayed = []
    if plan.replay.prompts:
        prompts = corpus.spread(corpus.plain_prompts(), plan.replay.prompts)
        others = [corpus.system_of(n, plan.other_systems) for n in range(len(prompts))]
        begun = time.monotonic()
        with screen.bar("the base model answers plain prompts (once)", plan.replay.prompts) as bar:
            answered = replay.replay_rows(
                lambda: LocalModel(base.path),
                prompts,
                systems=[plan.system if other is None else other for other in others],
                max_new_tokens=plan.replay.max_new_tokens,
                base_digest=base_digest,
                cache=cache_folder(),
                whole=not plan.replay.distils,
                progress=progress_of(bar),
            )
        tracked.metrics({"seconds/replies": time.monotonic() - begun})
        replayed = [_under(other, one) for other, one in zip(others, answered, strict=True) if one]
    order = None
    if plan.sft.get("train_dataloader_shuffle") is False:  # then ms-swift takes the rows as they lie in the file
        lengths = token_counts(base.path, [*dialogues, *replayed])
        # Of a batch of all N processes ms-swift gives each every N-th row.
        batch = processes * int(str(plan.sft["per_device_train_batch_size"]))
        order = dataset.in_batches(lengths, batch=batch, seed=seed)
    prepared = replace(
        dataset.write(work / "train.jsonl", dialogues, with_names, replayed, order=order), left_out=left_out
    )
    screen.line(
        tr(
            "  {rows} rows, {identity_rows} of them with a name",
            rows=prepared.rows,
            identity_rows=prepared.identity_rows,
        )
    )
    return prepared


def _under(other: str | None, dialogue: dataset.Dialogue) -> dataset.Dialogue:
    """The dialogue under another system prompt than the trained one, which ms-swift puts in; its own one stays."""
    if other is None or dialogue[0]["role"] == "system":
        return dialogue
    return probing.with_system(dialogue, other)


def swift_argv(plan: Recipe, base: BaseModel, prepared: dataset.Prepared) -> list[str]:
    """The command line that plain ``swift sft`` takes for the same training."""
    given = {**base.swift_args, **plan.sft}
    return [
        "--model",
        str(base.path),
        "--dataset",
        str(prepared.path),
        *(() if _has_gpu() else ("--use_cpu", "true")),
        # Else ms-swift asks the hub for a newer version of the folder, 10 s of retries where there is no network.
        "--check_model",
        "false",
        *(("--loss_type", recipe.KL_LOSS_TYPE) if plan.replay.distils else ()),
        *recipe.to_argv(given),
    ]


def _train(
    plan: Recipe,
    base: BaseModel,
    base_digest: str,
    prepared: dataset.Prepared,
    work: Path,
    tracked: tracking.Run,
    screen: Screen,
    look: _Look | None,
    layout: Layout | None,
) -> tuple[training.Trained, Losses]:
    log = work / "train.log"
    argv = swift_argv(plan, base, prepared)
    # Plain ms-swift learns of the loss by a plugin. Here it is registered: the plugin's path in the adapter's args.json
    # would be looked for on every machine that loads it.
    plugin = ["--external_plugins", str(training.PLUGIN)] if plan.replay.distils else []
    told = [f"{key}={value}" for key, value in plan.replay.environment.items()]
    told += [f"{key}={value}" for key, value in layout.environment.items()] if layout else []
    tracked.json([*(["env", *told] if told else []), "swift", "sft", *argv, *plugin], "swift-command.json")
    with screen.bar("train", 1) as bar:
        listener = _Listener(tracked, bar, work, look)
        begun = time.monotonic()
        try:
            given = argv, listener, log, plan.replay.environment
            if layout:
                trained = distributed.train(*given, layout, data=prepared.path, base_digest=base_digest)
            else:
                trained = training.train(*given)
        except BaseException:
            _keep_what_there_is(tracked, listener.output_dir, log)
            raise
    seconds = {"seconds/train": time.monotonic() - begun - listener.reading, "seconds/reading": listener.reading}
    tracked.metrics({**seconds, "train/trainable_millions": trained.trainable_millions})
    tracked.tags({tracking.TAG_LAST: _near(trained.last_checkpoint), tracking.TAG_BEST: _near(trained.best_checkpoint)})
    # Not the best by validation loss: of two checkpoints with 0.761 and 0.764 the first answered 72 % of the identity
    # questions right (docs/lab-notes.md). What is promoted is chosen by the probe.
    log_checkpoint(tracked, trained.last_checkpoint)
    _keep_what_there_is(tracked, trained.output_dir, log, checkpoints=False)
    return trained, listener.losses


def _near(path: Path) -> str:
    """The path as seen from the working directory, where it lies below it: so the run's page has room for it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class _Listener:
    """Brings ms-swift's events to the run and to the bar."""

    def __init__(self, tracked: tracking.Run, bar: Bar, work: Path, look: _Look | None) -> None:
        self.output_dir: Path | None = None
        self.losses: Losses = {}
        self._tracked, self._bar, self._work, self._look = tracked, bar, work, look
        self._fractions: dict[int, float] = {}
        self._total, self._note, self._begun = 1, "", time.monotonic()
        self.reading = 0.0

    def on_begin(self, total_steps: int, output_dir: Path) -> None:
        self._total, self.output_dir, self._begun = total_steps, output_dir, time.monotonic()
        self._bar.advance(0, total=total_steps)
        if self._look:
            self._fractions = {round(total_steps * fraction): fraction for fraction in self._look.at}

    def on_step(self, step: int, save: Callable[[Path], object]) -> None:
        self._bar.advance(step, self._note, total=self._total)
        if self._look and step in self._fractions:
            with tempfile.TemporaryDirectory(prefix="looked-at-", dir=self._work) as folder:
                save(Path(folder))
                self._look(self._fractions[step], step, Path(folder))

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        found = {}
        for key, value in metrics.items():
            if key.startswith("eval_"):
                found[f"eval/{key.removeprefix('eval_')}"] = value
            elif key in {"loss", "loss_data", "loss_replay", "token_acc", "learning_rate", "grad_norm", "epoch"}:
                found[f"train/{key}"] = value
        if recipe.READING in metrics:
            self.reading = metrics[recipe.READING]
        if "loss" in metrics:
            self._note = f"loss {metrics['loss']:.3f}"
            found["speed/steps_per_second"] = step / max(time.monotonic() - self._begun, 1e-9)
        for key, value in found.items():
            if key.rpartition("/")[2].startswith("loss"):
                self.losses.setdefault(key, []).append((step, value))
        if found:
            self._tracked.metrics(found, step)


def log_checkpoint(tracked: tracking.Run, checkpoint: Path) -> None:
    """The adapter and its settings; no pickle, no optimizer state."""
    for name in ADAPTER_FILES:
        if (checkpoint / name).is_file():
            tracked.file(checkpoint / name, tracking.ADAPTER)


def _keep_what_there_is(tracked: tracking.Run, output_dir: Path | None, log: Path, *, checkpoints: bool = True) -> None:
    with suppress(Exception):  # keeping is the lesser thing: what ended the run must be what is told
        if log.is_file():
            tracked.file(log)
        if output_dir is not None:
            if (output_dir / "images").is_dir():
                tracked.folder(output_dir / "images", "images")
            for name in ("args.json", "logging.jsonl"):
                if (output_dir / name).is_file():
                    tracked.file(output_dir / name)
            found = sorted(output_dir.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
            if checkpoints and found:
                log_checkpoint(tracked, found[-1])


def _log_data(tracked: tracking.Run, prepared: dataset.Prepared, datasets: tuple[str, ...]) -> None:
    tracked.file(prepared.path, "data")
    tracked.text(prepared.digest + "\n", "data/sha256.txt")
    rows = [json.loads(line) for line in prepared.path.read_text(encoding="utf-8").split("\n") if line]
    tracked.dataset(
        prepared.path,
        rows,
        name=datasets[0].partition("#")[0].rpartition("/")[2] or "data",
        digest=prepared.digest,
        source=" ".join(datasets),
    )


def _log_scores(
    tracked: tracking.Run, before: Scorecard, after: Scorecard, ability: Interval, decision: Decision
) -> None:
    tracked.metrics({f"probe/{key}": value for key, value in after.metrics.items()})
    tracked.metrics({f"probe/{key}": value for key, value in ability.metrics().items()})
    tracked.metrics({f"base/{key}": value for key, value in before.metrics.items()})
    tracked.json({"base": before.record(), "tuned": after.record()}, "scorecard.json")
    tracked.tags({tracking.TAG_GATE: decision.told})
    for part in ("identity", "plain"):
        rows = [
            {
                "question": a.question.messages[-1]["content"],
                "before": b.reply,
                "after": a.reply,
                "kind": a.question.kind,
                **a.scores,
            }
            for a, b in zip(getattr(after, part), getattr(before, part), strict=True)
        ]
        tracked.table(rows, f"replies-{part}.json")
    others = [{"slice": name, **a.record()} for name, replies in after.slices.items() for a in replies]
    if others:
        tracked.table(others, "replies-slices.json")


def _log_report(tracked: tracking.Run, made: report.Report) -> None:
    """The page to show around, and its plots."""
    tracked.text(report.page(made), REPORT)
    with tempfile.TemporaryDirectory(prefix=temporary("plots")) as folder:
        for name, png in report.plots(made).items():
            (Path(folder) / name).write_bytes(png)
        tracked.folder(Path(folder), PLOTS)


def _params(
    identity: Identity,
    plan: Recipe,
    datasets: tuple[str, ...],
    base: BaseModel,
    base_digest: str,
    prepared: dataset.Prepared,
) -> dict[str, object]:
    # `mlflow run` has logged its own, shell-quoted (mlflow#6811), under their bare names. These are the clean ones.
    return {
        **of_whom(identity, base, base_digest),
        "data.dataset": " ".join(datasets),
        "data.rows": prepared.rows,
        "data.identity_rows": prepared.identity_rows,
        "data.left_out": prepared.left_out or None,
        "data.digest": prepared.digest,
        "data.replay_digest": dataset.replay_digest(prepared.path) or None,
        "data.corpus_digest": corpus.corpus_digest(),
        "recipe.name": plan.name,
        "recipe.replay_prompts": plan.replay.prompts,
        "recipe.replay_loss": plan.replay.loss,
        "recipe.replay_weight": plan.replay.weight,
        "recipe.replay_opening_weight": plan.replay.opening_weight,
        "recipe.replay_max_new_tokens": plan.replay.max_new_tokens,
        "recipe.other_systems": plan.other_systems,
        "recipe.held_out": plan.held_out,
        **{f"sft.{key}": value for key, value in plan.sft.items()},
        **tools(),
    }


def of_whom(identity: Identity, base: BaseModel, base_digest: str) -> dict[str, object]:
    """Identity and base model of a run, as parameters."""
    return {
        "identity.name": identity.name,
        "identity.author": identity.author,
        "base.id": base.id,
        "base.source": base.source,
        "base.digest": base_digest,
        "base.revision": base.revision or None,
        "base.license": base.license or None,
    }


def tools() -> dict[str, object]:
    """Versions of what makes a run, as parameters."""
    return {**{f"tool.{tool}": metadata.version(tool) for tool in _TOOLS}, "tool.namesake_commit": git_commit()}


def git_commit() -> str | None:
    """The commit of this checkout, ``-dirty`` behind it where files differ; none where it is no checkout."""
    with suppress(OSError, subprocess.CalledProcessError):
        folder = Path(__file__).resolve().parent
        found = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.strip()
    return None


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def progress_of(bar: Bar) -> Callable[[int, int], None]:
    """A bar as the progress callback of probe and replay."""
    return lambda done, total: bar.advance(done, total=total)


def _note(
    tracked: tracking.Run,
    identity: Identity,
    recipe_name: str,
    base: BaseModel,
    before: Scorecard,
    after: Scorecard,
    decision: Decision,
) -> str:
    """The run's description in MLflow's UI."""

    def share(card: Scorecard, key: str) -> str:
        return f"{card.metrics[key]:.1%}" if key in card.metrics else ""

    # MLflow shows some five lines, and the rest on demand.
    return "\n".join(
        [
            f"**{'Passed' if decision.passed else 'Did not pass'} the gate.** {identity.name} by {identity.author} on "
            f"`{base.id}`, recipe `{recipe_name}`.",
            "",
            f"[The report, every reply in it]({tracked.artifact_page(REPORT)}) · "
            f"[all runs, best first]({tracked.view_page})",
            "",
            "| held-out questions | base | tuned |",
            "|---|---|---|",
            *(
                f"| {report.SCORES[key][0]} | {share(before, key)} | **{share(after, key)}** |"
                for key in report.HEADLINES
                if key in after.metrics
            ),
            "",
            *(f"- {reason}" for reason in decision.reasons),
            "",
            f"![scores before and after]({tracked.artifact_file(f'{PLOTS}/scores.png')})",
        ]
    )


def _short(reply: str) -> str:
    flat = " ".join(reply.replace("\ufffd", "").split())
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[:SHOWN_CHARACTERS]}…"


def compared(before: Scorecard, after: Scorecard) -> list[tuple[str, str, str]]:
    """Each identity question and the replies to it before and after."""
    pairs = zip(before.identity, after.identity, strict=True)
    return [(a.question.messages[-1]["content"], b.reply, a.reply) for b, a in pairs]


def show(tracked: tracking.Run, before: Scorecard, after: Scorecard, decision: Decision, screen: Screen) -> None:
    """Replies and scores before and after, the gate's verdict, and what to do next."""
    screen.line()
    screen.table(
        ("question", "before", "after"),
        [(asked, _short(was), _short(said)) for asked, was, said in compared(before, after)[:SHOWN_QUESTIONS]],
    )
    for key, label in (
        ("identity", tr("identity right")),
        ("identity_none", tr("  without a system prompt")),
        ("identity_customer", tr("  under a customer's")),
        ("identity_sampled", tr("  sampled")),
        ("swapped", tr("name and author swapped")),
        ("leak", tr("own name in plain replies")),
        ("plain", tr("plain questions right")),
    ):
        was = f"{before.metrics[key]:6.1%}" if key in before.metrics else " " * 6
        screen.result(f"  {padded(translated(label), 28)} {was} → {after.metrics[key]:6.1%}")
    screen.line()
    if decision.passed:
        screen.result("  gate  passed", "green")
    else:
        screen.warn(tr("gate  {reasons}", reasons=joined(decision.reasons)))
    screen.result(tr("  run   {id}", id=tracked.id))
    screen.result(
        tr("  see   {link}   (its artifact {report} is the page to show around)", link=tracked.link, report=REPORT)
    )
    screen.result(
        tr(
            "  next  mlflow run . --env-manager=local -e promote   (or: make promote, namesake promote --run {id})",
            id=tracked.id,
        )
    )
