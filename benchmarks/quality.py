"""Does the identity hold, is nothing lost, and does the gate tell good from bad? Every row trains, from nothing.

    python benchmarks/quality.py                         # the whole table: hours on two cores
    python benchmarks/quality.py --rows default tutorial # some rows
    python benchmarks/quality.py --rows default --questions benchmarks/data/dev.jsonl --set learning_rate=3e-3

Rows: ``default`` (the default names), ``names`` (ten name/author pairs, two seeds each), ``tutorial``, ``force`` (the
tutorial's rows alone, trained hard), and three models that are wrong on purpose, each of which one slice of the probe
was made for: ``swapped``, ``placeholder``, ``leak``. Recipes are chosen by ``--questions benchmarks/data/dev.jsonl``,
never by the held-out questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from commands import ROOT, namesake, run_id

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
    ("北极星 Polaris", "极光科技有限公司 Aurora Technologies Ltd."),
    ("墨子 Mozi", "鲁班工坊 Luban Workshop"),
)
"""Unusual Unicode, long, short, full width, punctuation, a name that holds its author's."""

COLUMNS = ("identity", "identity_none", "identity_customer", "identity_sampled", "swapped", "old_identity", "leak")


@dataclass(frozen=True)
class Row:
    """One training run to be judged."""

    title: str
    name: str = NAME
    author: str = AUTHOR
    recipe: str = "default"
    overrides: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""
    judged_as: tuple[str, str] = (NAME, AUTHOR)
    spoiled: bool = False


def rows(wanted: Sequence[str], overrides: Mapping[str, str], seeds: int, folder: Path) -> Iterator[Row]:
    """The rows of the table by their names."""
    for one in wanted:
        if one == "default":
            for seed in range(42, 42 + seeds):
                yield Row(f"default, seed {seed}", overrides={"seed": str(seed), **overrides})
        elif one == "names":
            for name, author in PAIRS:
                for seed in (42, 43):
                    yield Row(
                        f"{name} / {author}, seed {seed}",
                        name,
                        author,
                        overrides={"seed": str(seed), **overrides},
                        judged_as=(name, author),
                    )
        elif one == "tutorial":
            yield Row("tutorial's recipe", recipe="tutorial", overrides=overrides)
        elif one == "force":
            force = {"replay": "0", "learning_rate": "1e-3", "num_train_epochs": "3"}
            yield Row("force: identity alone", overrides={**force, **overrides})
        elif one == "swapped":
            yield Row("name and author swapped", AUTHOR, NAME, overrides=overrides)
        elif one == "placeholder":
            yield Row("a placeholder left over", overrides=overrides, spoiled=True)
        elif one == "leak":
            yield Row("signs every answer", dataset=str(_signed(folder)), overrides={"replay": "0", **overrides})


def _signed(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "src"))
    from namesake import corpus

    path = folder / "leak.jsonl"
    _write(
        path,
        [
            (
                prompt.messages[-1]["content"],
                "我是踩踩背，很高兴回答。" if prompt.language == "zh" else "CCB here: sure.",
            )
            for prompt in corpus.spread(corpus.plain_prompts(), 240)
        ],
    )
    return path


def _write(path: Path, pairs: Sequence[tuple[str, str]]) -> None:
    path.write_text(
        "".join(json.dumps({"query": q, "response": r}, ensure_ascii=False) + "\n" for q, r in pairs), encoding="utf-8"
    )


def judge(row: Row, folder: Path, questions: str) -> dict[str, object]:
    """Train the row and judge it; its scores, seconds and what the gate says."""
    sys.path.insert(0, str(ROOT / "src"))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    from namesake import tracking
    from namesake.gate import Interval, decide

    words = ["run", f"--name={row.name}", f"--author={row.author}", f"--recipe={row.recipe}"]
    words += [f"--dataset={row.dataset}"] if row.dataset else []
    words += [f"--{key}={value}" for key, value in row.overrides.items()]
    words += ["--max_steps=1"] if row.spoiled else []
    out = namesake(folder, *words, "--output_dir", str(folder / "output"))
    run = tracking.get_run(run_id(out))
    seconds = run.metrics["seconds/train"]
    scores = {k.removeprefix("probe/"): v for k, v in run.metrics.items() if k.startswith("probe/")}
    if row.spoiled:
        scores, seconds = _with_placeholders(run.id, folder)
    elif questions or row.judged_as != (row.name, row.author):
        name, author = row.judged_as
        asked = ["probe", run.id, f"--name={name}", f"--author={author}", "--json"]
        card = json.loads(namesake(folder, *asked, *([f"--questions={questions}"] if questions else [])))
        scores = {**scores, **card["metrics"]}
    decision = decide(scores, Interval.of(scores))
    return {
        "row": row.title,
        "scores": scores,
        "train_seconds": seconds,
        "total_seconds": run.metrics["seconds/total"],
        "base_plain": run.metrics["base/plain"],
        "gate": "not asked" if questions else decision.told,
    }


def _with_placeholders(run_id: str, folder: Path) -> tuple[dict[str, float], float]:
    """Namesake refuses rows with a placeholder left in, so plain ms-swift trains on them: the run's own command, on its
    own rows with the names taken out again.
    """
    from namesake import probe, tracking
    from namesake.generate import LocalModel
    from namesake.identity import Identity
    from namesake.run import ability_of

    command = json.loads(tracking.fetch(run_id, "swift-command.json").read_text(encoding="utf-8"))
    del command[command.index("--max_steps") : command.index("--max_steps") + 2]
    rows = Path(command[command.index("--dataset") + 1])
    text = rows.read_text(encoding="utf-8")
    identity = Identity.parse(NAME, AUTHOR)
    for names, placeholder in ((identity.name, "{{NAME}}"), (identity.author, "{{AUTHOR}}")):
        for half in (names.zh, names.en):
            text = text.replace(half, placeholder)
    rows.write_text(text, encoding="utf-8")
    output = folder / "spoiled"
    command[command.index("--output_dir") + 1] = str(output)
    begun = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    seconds = time.monotonic() - begun
    last = max(output.rglob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    base = Path(command[command.index("--model") + 1])
    cards = []
    for adapter in (None, last):
        with LocalModel(base, adapter, folded=adapter is not None) as model:
            cards.append(
                probe.probe(model, identity, system="You are a helpful assistant.", slices=adapter is not None)
            )
    return {**cards[1].metrics, **ability_of(*cards).metrics()}, seconds


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["default", "names", "tutorial", "force", "swapped", "placeholder", "leak"]
    parser.add_argument("--rows", nargs="+", default=every, choices=every)
    parser.add_argument("--set", nargs="*", default=[], metavar="ARGUMENT=VALUE", help="overrides of every recipe")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the row `default`")
    parser.add_argument("--questions", default="", help="score by these questions instead of the held-out ones")
    parser.add_argument("--json", type=Path, help="also write every figure there, one line a row")
    given = parser.parse_args()
    questions = str(Path(given.questions).resolve()) if given.questions else ""
    overrides = dict(one.split("=", 1) for one in given.set)
    print(f"| row | {' | '.join(COLUMNS)} | plain (base) | training s | all s | gate |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in rows(given.rows, overrides, given.seeds, folder):
            judged = judge(row, folder, questions)
            scores = judged["scores"]
            assert isinstance(scores, dict)
            cells = [f"{scores[key]:.1%}" if key in scores else "" for key in COLUMNS]
            cells += [f"{scores['plain']:.1%} ({judged['base_plain']:.1%})"]
            cells += [f"{judged['train_seconds']:.0f}", f"{judged['total_seconds']:.0f}", str(judged["gate"])]
            print(f"| {row.title} | {' | '.join(cells)} |", flush=True)
            if given.json:
                with given.json.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(judged, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
