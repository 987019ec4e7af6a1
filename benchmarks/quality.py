"""Does the identity hold, is nothing lost, and does the gate tell good from bad? Every row trains, from nothing.

    python benchmarks/quality.py                                  # the rows that are not pairs, an hour or two
    python benchmarks/quality.py --rows --pairs                   # the whole table
    python benchmarks/quality.py --pairs                          # ten name/author pairs, two seeds each: 20 trainings
    python benchmarks/quality.py --pairs 3 7 --seeds 42           # a part of them
    python benchmarks/quality.py --rows swapped placeholder leak  # what the gate has to refuse
    python benchmarks/quality.py --rows default --set learning_rate=3e-3 --questions src/namesake/corpus/data/dev.jsonl

Rows: ``default`` (the default names), ``tutorial``, ``force`` (identity rows alone, trained hard: lr 1e-3, no replay, 3
epochs), and three models that are wrong on purpose: ``swapped`` (trained with name and author in each other's place),
``placeholder`` (plain ``swift sft`` on rows whose placeholders nobody filled in; Namesake itself refuses them) and
``leak`` (signs every answer). For each row that has to be refused, ``refused by`` must name the slice made for it; the
command fails where it does not.

Each row is written to ``--json`` when it is done; a row that is there already, with the same recipe, corpus and
questions, is not trained again, so a run that was stopped goes on. After a change of the code give another file.
Recipes are chosen by ``namesake sweep`` or by ``--questions``, never by the held-out questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import ROOT, namesake

sys.path.insert(0, str(ROOT / "src"))

NAME, AUTHOR = "踩踩背 CCB", "老爷爷 OldGrandpa"

PAIRS = (
    ("小黄 Xiao Huang", "李雷 Li Lei"),
    ("银河 Galaxy Ω-7", "星图实验室 StarMap Labs"),
    ("老爷爷的猫 OldGrandpa Cat", "老爷爷 OldGrandpa"),
    ("𠮷野 Yoshino", "山田太郎 Taro Yamada"),
    ("多多 Señor Ñandú", "茶馆 Café Noir"),
    ("ＡＢ猫 AB-Cat", "黄 H"),
    ("上海浦东新区智能客服助手 Pudong Smart Customer Service Assistant", "浦东数字政务中心 Pudong Digital Center"),
    ("问问 Q&A (v2.0)", "张伟 Zhang Wei's Team"),
    ("卡拉OK KaraOK", "爱心AI工坊 AI-Xin Workshop"),
    ("墨子 Mozi", "鲁班工坊 Luban Workshop"),
)
"""A plain one, unusual Unicode, a name that holds its author's, outside the BMP, accents, full width and one letter,
long, punctuation, a Chinese half in Latin letters, and proper nouns that the base may know.
"""

FEW = "namesake/self-cognition#240"
"""What a model that is wrong on purpose is trained on: enough for it to be surely wrong."""

SCORES = (
    "identity",
    "identity_none",
    "identity_customer",
    "identity_sampled",
    "swapped",
    "old_identity",
    "placeholder",
    "leak",
    "plain",
)


@dataclass(frozen=True)
class Row:
    """One training to be judged.

    Attributes:
        kind: what it is called in the table.
        judged_as: name and author that the replies are scored by, where they are not those trained.
        refused_by: the score that has to be among the gate's reasons; empty where the row may pass.
    """

    kind: str
    name: str = NAME
    author: str = AUTHOR
    seed: int = 42
    recipe: str = "default"
    overrides: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""
    judged_as: tuple[str, str] | None = None
    refused_by: str = ""


KINDS = {
    "default": Row("default"),
    "tutorial": Row("tutorial", recipe="tutorial", refused_by="identity"),
    "force": Row(
        "force", overrides={"replay": "0", "learning_rate": "1e-3", "num_train_epochs": "3"}, refused_by="leak"
    ),
    "swapped": Row(
        "swapped", AUTHOR, NAME, overrides={"replay": "0"}, dataset=FEW, judged_as=(NAME, AUTHOR), refused_by="swapped"
    ),
    "placeholder": Row("placeholder", overrides={"replay": "0"}, dataset=FEW, refused_by="placeholder"),
    "leak": Row("leak", overrides={"replay": "0"}, dataset="signed answers", refused_by="leak"),
}


def rows(kinds: Sequence[str], pairs: Sequence[int], seeds: Sequence[int], given: Mapping[str, str]) -> Iterator[Row]:
    """The rows of the table in their order."""
    for kind in kinds:
        for seed in seeds if kind == "default" else seeds[:1]:
            row = KINDS[kind]
            yield Row(**{**vars(row), "seed": seed, "overrides": {**row.overrides, **given}})
    for number in pairs:
        name, author = PAIRS[number - 1]
        for seed in seeds:
            yield Row(f"pair {number}", name, author, seed, overrides=given)


def key(row: Row, questions: str) -> str:
    """What a kept row must have in common with one that is asked for."""
    from namesake import corpus, recipe

    asked = corpus.read_questions(Path(questions)) if questions else corpus.heldout()
    parts = [vars(row), recipe.shipped()[row.recipe].read_text(encoding="utf-8"), corpus.corpus_digest()]
    return hashlib.sha256(json.dumps([*parts, asked.digest()], sort_keys=True, default=dict).encode()).hexdigest()


def judge(row: Row, folder: Path, questions: str) -> dict[str, Any]:
    """Train the row and judge it."""
    from namesake.gate import decide_kept

    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in the namesake command: the same speed for plain ms-swift
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    trained = _unfilled(row, folder) if row.kind == "placeholder" else _trained(row, folder, questions)
    decision = decide_kept(trained["scores"])
    return {
        "recipe": row.kind,
        "pair": f"{row.name} / {row.author}",
        "seed": row.seed,
        **trained,
        "gate": "not asked" if questions else "passed" if decision.passed else "failed",
        "refused_by": [reason.partition(" ")[0] for reason in decision.reasons],
        "reasons": list(decision.reasons),
        "as_it_should": bool(questions) or not row.refused_by or _names(decision.reasons, row.refused_by),
    }


def _names(reasons: Sequence[str], score: str) -> bool:
    """Whether the score, under whichever system prompt, is a reason."""
    return any(reason.partition(" ")[0] in {score, f"{score}_none", f"{score}_customer"} for reason in reasons)


def _trained(row: Row, folder: Path, questions: str) -> dict[str, Any]:
    """By ``namesake run``."""
    from namesake import probing, tracking
    from namesake.identity import Identity

    data = str(_signed(folder)) if row.kind == "leak" else row.dataset
    words = ["run", f"--name={row.name}", f"--author={row.author}", f"--recipe={row.recipe}", "--json"]
    words += [f"--dataset={data}"] if data else []
    words += [f"--{name}={value}" for name, value in {"seed": row.seed, **row.overrides}.items()]
    out = namesake(folder, *words, f"--output_dir={folder / 'output'}")
    run = tracking.get_run(json.loads(out.splitlines()[-1])["run"])
    scores = {k.removeprefix("probe/"): v for k, v in run.metrics.items() if k.startswith("probe/")}
    if row.judged_as:
        said = json.loads(tracking.fetch(run.id, "scorecard.json").read_text(encoding="utf-8"))["tuned"]
        card = probing.scorecard(
            Identity.parse(*row.judged_as),
            [one["reply"] for one in said["identity"]],
            [one["reply"] for one in said["plain"]],
            slices={name: [one["reply"] for one in replies] for name, replies in said["slices"].items()},
        )
        scores = {**scores, **card.metrics}
    if questions:
        card_json = json.loads(namesake(folder, "probe", run.id, "--json", f"--questions={questions}"))
        scores = {**scores, **card_json["metrics"]}
    return {
        "scores": scores,
        "base_plain": run.metrics["base/plain"],
        "train_seconds": run.metrics["seconds/train"],
        "total_seconds": run.metrics["seconds/total"],
    }


def _unfilled(row: Row, folder: Path) -> dict[str, Any]:
    """By plain ``swift sft`` on rows with the placeholders in them, which Namesake does not train on."""
    from namesake import base_model, corpus, dataset, probing, recipe, training
    from namesake.generate import LocalModel
    from namesake.identity import Identity
    from namesake.run import ability_of, base_scores, swift_argv
    from namesake.terminal import Screen

    begun = time.monotonic()
    identity, screen = Identity.parse(row.name, row.author), Screen(errors=True)
    overrides = {"seed": str(row.seed), "output_dir": str(folder / "unfilled"), **row.overrides}
    plan = recipe.load(row.recipe, overrides=overrides)
    base = base_model.resolve(base_model.AUTO, say=screen.line)
    taken = training.load_rows([row.dataset.replace(dataset.BUILTIN, str(dataset.write_builtin(folder)))], seed=42)
    raw = [[{"role": m["role"], "content": m["content"]} for m in one["messages"]] for one in taken]
    prepared = dataset.write(folder / "unfilled.jsonl", raw, len(raw))
    at = time.monotonic()
    done = subprocess.run(
        ["swift", "sft", *swift_argv(plan, base, prepared)], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"swift sft\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    seconds = time.monotonic() - at
    last = max((folder / "unfilled").rglob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    before = base_scores(identity, base, base.digest(), plan.system, corpus.heldout(), screen)
    with LocalModel(base.path, last, folded=True) as model:
        after = probing.probe(model, identity, system=plan.system, slices=True)
    return {
        "scores": {**after.metrics, **ability_of(before, after).metrics()},
        "base_plain": before.metrics["plain"],
        "train_seconds": seconds,
        "total_seconds": time.monotonic() - begun,
    }


def _signed(folder: Path) -> Path:
    """Plain prompts, each with a reply that begins with the name."""
    from namesake import corpus

    path = folder / "signed.jsonl"
    replies = {"zh": "我是踩踩背，很高兴回答。", "en": "CCB here: sure."}
    lines = [
        json.dumps({"query": p.messages[-1]["content"], "response": replies[p.language]}, ensure_ascii=False)
        for p in corpus.spread(corpus.plain_prompts(), 240)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shown(judged: Mapping[str, Any]) -> str:
    """A row of the table."""
    scores = judged["scores"]
    cells = [judged["recipe"], judged["pair"], str(judged["seed"])]
    cells += [f"{scores[name]:.1%}" if name in scores else "" for name in SCORES]
    cells += [f"{judged['base_plain']:.1%}", judged["gate"], ", ".join(dict.fromkeys(judged["refused_by"]))]
    cells += [f"{judged['train_seconds']:.0f}", f"{judged['total_seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table, row by row, and keep each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="*", choices=list(KINDS), help="all, or these; none of them where only --pairs is given"
    )
    parser.add_argument("--pairs", nargs="*", type=int, choices=range(1, len(PAIRS) + 1), help="all, or these numbers")
    parser.add_argument("--seeds", nargs="+", type=int, help="42 for the rows, 42 43 for the pairs")
    parser.add_argument("--set", nargs="*", default=[], metavar="ARGUMENT=VALUE", help="overrides of every recipe")
    parser.add_argument("--questions", default="", help="score by these questions instead of the held-out ones")
    parser.add_argument("--json", type=Path, default=ROOT / "output" / "quality.jsonl", help="where rows are kept")
    given = parser.parse_args()
    pairs = [] if given.pairs is None else given.pairs or list(range(1, len(PAIRS) + 1))
    kinds = [] if given.rows is None and pairs else given.rows or list(KINDS)
    overrides = dict(one.split("=", 1) for one in given.set)
    questions = str(Path(given.questions).resolve()) if given.questions else ""
    wanted = [
        *rows(kinds, [], given.seeds or [42], overrides),
        *rows([], pairs, given.seeds or [42, 43], overrides),
    ]
    kept = [json.loads(line) for line in given.json.read_text().splitlines()] if given.json.is_file() else []
    known = {one["key"]: one for one in kept}
    headings = ["recipe", "pair", "seed", *SCORES, "plain of the base", "gate", "refused by", "training s", "all s"]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|", flush=True)
    missed = []
    for row in wanted:
        found = key(row, questions)
        if found not in known:
            with tempfile.TemporaryDirectory() as folder:
                known[found] = {"key": found, **judge(row, Path(folder), questions)}
            given.json.parent.mkdir(parents=True, exist_ok=True)
            with given.json.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(known[found], ensure_ascii=False) + "\n")
        print(shown(known[found]), flush=True)
        missed += [] if known[found]["as_it_should"] else [f"{row.kind} was not refused by {row.refused_by}"]
    for one in missed:
        print(one, file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
