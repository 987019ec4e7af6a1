"""The guide and the README: generated pages are up to date, commands exist, links lead somewhere, languages match.

Commands are parsed by the parsers that would run them: namesake's own, MLflow's, and the one of recipes for ms-swift's
arguments; of the Makefile the targets and variables.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow.cli
import pytest
import typer
import yaml

from namesake import cli, gate, recipe
from namesake.errors import InputError
from namesake.identity import Identity
from namesake_serving import __main__ as serving
from tests import json_page
from tests.unit.scripts import script

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide"
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
ENGLISH = [page for page in (ROOT / "README.md", *sorted(GUIDE.rglob("*.md"))) if not page.name.endswith(".zh.md")]

_FENCE = re.compile(r"^( *)```(\w*).*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^\n|\A)((?: {4}.*\n)+)", re.MULTILINE)
_INLINE = re.compile(r"`((?:namesake|make|mlflow run) [^`]+)`")
_ENDS = frozenset({";", ";;", "&&", "||", "|", "&", "(", ")", ">", ">>", "<"})
"""Where one command of a shell line ends."""


def name_of(page: Path) -> str:
    """The page as a test's name."""
    return page.relative_to(ROOT).as_posix()


# The generated pages.


def test_reference_pages_are_what_the_code_says() -> None:
    made, untranslated = script("generate").pages()
    stale = [name_of(path) for path, text in made.items() if not path.is_file() or path.read_text("utf-8") != text]
    assert not stale, f"run `make docs` and commit: {', '.join(stale)}"
    assert set(script("generate").FOLDER.iterdir()) == set(made)
    assert not untranslated, "write their Chinese into docs/reference.zh.yaml, or into the catalogue"


def test_every_command_setting_bound_and_metric_is_in_the_reference() -> None:
    made, _ = script("generate").pages()
    text = "".join(made.values())
    names = [*script("generate").commands(), *script("generate").Settings.model_fields, *script("generate").routes()]
    assert not [name for name in names if name not in text]


# Commands.


def blocks(text: str) -> Iterator[str]:
    """Shell text of a page: fenced blocks of a shell, and indented ones outside of fences."""
    for _, language, body in _FENCE.findall(text):
        if language in {"bash", "sh", "shell", "console"}:
            yield body
    for body in _INDENTED.findall(_FENCE.sub("", text)):
        yield body


def commands(text: str) -> Iterator[list[str]]:
    """The commands of shell text, each as its words; what is not ours among them."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"\b(?:namesake|make|mlflow)\b", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _ENDS:
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
                words = words[1:]
            if words:
                yield words
            words = []


def fault(words: Sequence[str]) -> str:
    """What is wrong with a command; empty where nothing is, or where it is none of ours."""
    program, *rest = words
    program = program.rpartition("/")[2]
    try:
        if program == "namesake":
            _namesake(rest)
        elif program == "make":
            _make(rest)
        elif program == "mlflow" and rest[:1] == ["run"]:
            _mlflow_run(rest[1:])
        elif program == "mlflow":
            _mlflow(rest)
    except (InputError, ValueError, LookupError) as error:
        return f"{error}"
    return ""


def _parsed(command: Any, name: str, words: Sequence[str], usage_error: Any) -> Any:
    """The command's context after its parser has read the words."""
    try:
        return command.make_context(name, [*words])
    except usage_error as error:
        raise ValueError(f"{name}: {error.format_message()}") from error


def _namesake(words: Sequence[str]) -> None:
    group: Any = typer.main.get_command(cli.app)
    options = {option for parameter in group.params for option in parameter.opts} | {"--help"}
    if not words or words[0] in options:
        return
    name, *rest = words
    if name not in group.commands:
        raise LookupError(f"namesake has no command {name}")
    if "--help" in rest:
        return
    command = typer.main.get_command(serving.app) if name == "serve" else group.commands[name]
    context = _parsed(command, f"namesake {name}", rest, typer.BadParameter.__base__)
    if name == "run":
        given = context.params
        Identity.parse(given["name"], given["author"])
        _recipe(given["recipe"], recipe.pairs(context.args), given["args"])


def _recipe(name: str, overrides: dict[str, str], args: str) -> None:
    """A file of the reader's own stands for the default recipe."""
    recipe.load("default" if name.endswith(".yaml") else name, overrides=overrides, args=args)


def _make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) [?:]=", makefile, re.MULTILINE)) | set(
        re.findall(r"\$\(([A-Z]+)\)", makefile)
    )
    given = dict(word.split("=", 1) for word in words if "=" in word)
    goals = [word for word in words if "=" not in word]
    if strange := [*({*given} - variables), *({*goals} - targets)]:
        raise LookupError(f"the Makefile has no {', '.join(strange)}")
    args = shlex.split(given.get("ARGS", ""))
    for goal in goals:
        if goal in {"run", "promote", "serve"}:
            name, author = (
                f"{key.lower()}={given[key]}" if key in given else f"{key.lower()}={default}"
                for key, default in (("NAME", "踩踩背 CCB"), ("AUTHOR", "老爷爷 OldGrandpa"))
            )
            own = ["-P", name, "-P", author] if goal == "run" else ["-e", goal]
            _mlflow_run([".", "--env-manager=local", *own, *args])
        elif goal == "chat":
            _namesake(["chat", *args])


def _mlflow_run(words: Sequence[str]) -> None:
    if not words:  # the command's name alone
        return
    given = _parsed(mlflow.cli.run, "mlflow run", words, mlflow.cli.click.UsageError).params
    project = ROOT / given["uri"] / "MLproject"
    if not project.is_file():
        raise ValueError(f"mlflow run {given['uri']}: there is no MLproject")
    entries = yaml.safe_load(project.read_text(encoding="utf-8"))["entry_points"]
    entry = given["entry_point"]
    if entry not in entries:
        raise LookupError(f"MLproject has no entry point {entry}")
    values = dict(pair.split("=", 1) for pair in given["param_list"])
    known = entries[entry]["parameters"]
    others = {key: value for key, value in values.items() if key not in known}
    if entry == "main":
        filled = {key: values.get(key, about["default"]) for key, about in known.items()}
        Identity.parse(filled["name"], filled["author"])
        _recipe(filled["recipe"], others, filled["args"])
    elif others:
        raise LookupError(f"the entry point {entry} has no parameter {', '.join(others)}")


def _mlflow(words: Sequence[str]) -> None:
    command: Any = mlflow.cli.cli
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            raise LookupError(f"mlflow has no {words[0]}")
        command, words = command.commands[words[0]], words[1:]
    _parsed(command, f"mlflow {command.name}", words, mlflow.cli.click.UsageError)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = [words for block in blocks(text) for words in commands(block)]
    spans = [words for span in _INLINE.findall(_FENCE.sub("", text)) for words in commands(span)]
    # In running text a command's name alone is a name.
    found += [words for words in spans if len(words) > 2 or words[1] not in script("generate").commands()]
    wrong = [f"{shlex.join(words)}: {told}" for words in found if (told := fault(words))]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "namesake prmote",
        "namesake promote --overide x",
        "namesake serve --no-such-flag",
        "namesake serve models:/ccb/1 models:/ccb/2",
        "namesake probe",
        "namesake run --learning_rte 1",
        "namesake run --recipe nosuch",
        'namesake run --name "踩踩背"',
        "make trian",
        "make run NAEM=x",
        'make run ARGS="-P learning_rte=1"',
        'make run NAME="one"',
        "make promote ARGS='-P why=x'",
        "make chat ARGS='--mesage x'",
        "mlflow run . -e nosuch",
        "mlflow run . --no-such-option",
        "mlflow run elsewhere",
        "mlflow run . -e serve -P prot=1",
        'mlflow run . -P args="--lora_rnk 16"',
        "mlflow servre",
        "mlflow server --no-such-option",
        "PATH=x make check && .venv/bin/namesake histroy | cat",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    assert [told for words in commands(line) if (told := fault(words))]


def test_a_page_has_the_commands_that_are_looked_for() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (GUIDE / "tutorial.md").read_text(encoding="utf-8")
    found = [words[:2] for block in blocks(text) for words in commands(block)]
    assert found.count(["make", "promote"]) >= 3
    assert ["namesake", "rollback"] in found


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readme_leads_a_stranger_to_the_chat_page(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import stranger

    found = stranger.commands(ROOT / readme)
    assert [step for step in found if step != "test"][:3] == ["run", "promote", "serve"]
    assert stranger.NAMED.search(found["run"])
    assert "override=" in found["promote"]  # the default recipe does not pass on the embedded model
    assert not [told for line in found.values() for words in commands(line) if (told := fault(words))]
    text = (ROOT / readme).read_text(encoding="utf-8")
    assert 0 < text.index("make serve\n    make chat") < text.index("<http://127.0.0.1:8000/>") < text.index("curl")
    measured = re.findall(r"(\d+) s from `git clone`", (ROOT / "docs" / "lab-notes.md").read_text(encoding="utf-8"))
    (named,) = re.findall(r"\b(\d+) (?:s|秒)[^\n]*\(?`python benchmarks/stranger\.py`", text)
    assert named == measured[-1]
    assert int(named) <= stranger.GOAL


# What pages quote.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_json_is_json(page: Path) -> None:
    for _, language, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "json":
            try:
                json.loads(body)
            except ValueError:  # a line each
                assert [json.loads(line) for line in body.splitlines()]


def test_the_page_for_those_who_come_from_ms_swift_has_the_tutorials_command_whole() -> None:
    page = (GUIDE / "explanation" / "from-ms-swift.md").read_text(encoding="utf-8")
    (written,) = (words for block in blocks(page) for words in commands(block) if "--train_type" in words)
    given = recipe.pairs(written[written.index("--train_type") :])
    assert recipe.load("tutorial", overrides=given).sft == recipe.load("tutorial").sft
    assert len(given) == len(recipe.load("tutorial").sft) - 1  # split_dataset_ratio was ms-swift's default then
    for kept in ("swift infer --model", "swift export", "--merge_lora", "swift infer --adapters", "--model_author"):
        assert kept in page


def test_every_command_that_speaks_json_has_its_shape_on_the_page() -> None:
    group: Any = typer.main.get_command(cli.app)
    speaking = [name for name, one in group.commands.items() if "--json" in {o for p in one.params for o in p.opts}]
    page = (GUIDE / "howto" / "json.md").read_text(encoding="utf-8")
    assert re.findall(r"^## namesake (\w+)$", page, re.MULTILINE) == speaking
    mute = [name for name in group.commands if name not in speaking]
    assert mute == ["serve", "chat"], "what tells facts has --json"
    assert "All commands have it but `serve` and `chat`." in " ".join(page.split())


def test_every_shape_on_the_page_is_held_to_what_its_command_prints() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    looped = {"promote", "gate"}  # by one loop
    assert {*json_page.commands()} == looped | {*re.findall(r'assert_as_shown\("(\w+)"', sources)}


@pytest.mark.parametrize(
    ("printed", "wanted", "wrong"),
    [
        ({"a": 1, "b": [{"c": "x"}]}, {"a": 2.5, "b": [{"c": "y"}]}, []),
        ({"a": 1}, {"a": 1, "b": 2}, [".b is in one only"]),
        ({"a": 1, "b": 2}, {"a": 1}, [".b is in one only"]),
        ({"a": True}, {"a": 1}, [".a is True, shown is 1"]),
        ({"a": "1"}, {"a": 1}, [".a is '1', shown is 1"]),
        ({"a": None}, {"a": {"b": 1}}, []),
        ([{"a": 1}, {"b": 1}], [{"a": 1}], ["[1].a is in one only", "[1].b is in one only"]),
        ({"scores": {"x": 1}}, {"scores": {"y": 1.0}}, []),
        ({"scores": {"x": "1"}}, {"scores": {"x": 1.0}}, [".scores.x is '1', shown is 1.0"]),
        ({"metrics": {"x": 1, "y": 2}}, {"metrics": {"x": 1}}, []),
        ({"metrics": {"x": 1}}, {"metrics": {"x": 1, "y": 2}}, [".metrics.y is in one only"]),
    ],
)
def test_another_shape_is_noticed(printed: object, wanted: object, wrong: list[str]) -> None:
    assert [*json_page.differences(printed, wanted)] == wrong


SHARES = {
    "identity right": "identity",
    "without a system prompt": "identity_none",
    "under a customer's": "identity_customer",
    "sampled": "identity_sampled",
    "name and author swapped": "swapped",
    "own name in plain replies": "leak",
    "plain questions right": "plain",
}
"""Lines that ``make run`` ends with, and the metric of each."""
TELLING = [page for name in ("README", "docs/guide/tutorial") for page in sorted(ROOT.glob(f"{name}*.md"))]
JUDGING = [*sorted(GUIDE.glob("tutorial*.md")), *sorted((GUIDE / "explanation").glob("gate*.md"))]


@pytest.mark.parametrize("page", TELLING, ids=name_of)
def test_the_shares_that_a_page_shows_are_those_of_the_one_run(page: Path) -> None:
    run = json_page.shown("run")
    lines = re.findall(
        r"^ *(\w[\w ']+?) +(?:([\d.]+)%)? *→ +([\d.]+)%$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    found = {name: (before, after) for name, before, after in lines}
    assert len(found) == len(lines)
    wanted = {
        name: (f"{100 * run['before'][key]:.1f}" if key in run["before"] else "", f"{100 * run['after'][key]:.1f}")
        for name, key in SHARES.items()
    }
    assert found == wanted


@pytest.mark.parametrize("page", JUDGING, ids=name_of)
def test_the_verdict_that_a_page_shows_is_that_of_the_one_run(page: Path) -> None:
    run, text = json_page.shown("run"), page.read_text(encoding="utf-8")
    assert "".join(f"\n  {reason}" for reason in run["reasons"]) in text.partition("not passed:")[2]
    assert not [
        one
        for one in re.findall(r"^  \w+ [\d.]+%(?: right)?, at .*$", text, re.MULTILINE)
        if one[2:] not in run["reasons"]
    ]
    assert {*re.findall(r"namesake gate ([0-9a-f]+)", text)} <= {run["run"]}


def test_the_run_that_the_pages_show_is_one_and_the_gate_says_so() -> None:
    run, judged, probed, promoted = (json_page.shown(name) for name in ("run", "gate", "probe", "promote"))
    assert (judged["passed"], judged["reasons"]) == (run["passed"], run["reasons"])
    assert probed["metrics"] == run["after"]
    text = (GUIDE / "explanation" / "gate.md").read_text(encoding="utf-8")
    (after, before, low, high) = re.search(
        r"([\d.]+) % right where the base has ([\d.]+) %, "
        r"the interval of the difference is (-[\d.]+) to \+([\d.]+) points",
        text,
    ).groups()  # type: ignore[union-attr]
    assert (after, before) == tuple(f"{100 * run[side]['plain']:.1f}" for side in ("after", "before"))
    ability = gate.Interval(run["after"]["plain"] - run["before"]["plain"], float(low) / 100, float(high) / 100)
    assert [*gate.decide(run["after"], ability).reasons] == run["reasons"]
    assert [one for one in promoted["reasons"] if not one.startswith("leak")] == run["reasons"][:-1]
    for readme in ROOT.glob("README*.md"):
        assert f"! gate  {run['reasons'][0]}; …" in readme.read_text(encoding="utf-8")
    for page in GUIDE.rglob("json*.md"):
        assert [
            json.loads(body) for _, language, body in _FENCE.findall(page.read_text("utf-8")) if language == "json"
        ] == [json_page.shown(command) for command in json_page.commands()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_is_named_exists(page: Path) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if f"def {name}(" not in sources]


# Links and languages.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]
    files = [target.partition("#")[0] for target in targets]
    assert not [file for file in files if file and not (page.parent / file).is_file()]


@pytest.mark.parametrize("page", [*ROOT.glob("README.zh.md"), *sorted(GUIDE.rglob("*.zh.md"))], ids=name_of)
def test_a_chinese_page_leads_to_chinese_ones(page: Path) -> None:
    targets = re.findall(r"\]\(([^():#\s]+)\.md[#)]", page.read_text(encoding="utf-8"))
    english = [one for one in targets if not one.endswith(".zh") and (page.parent / f"{one}.zh.md").is_file()]
    assert english == (["README"] if page.parent == ROOT else [])


def laid_out(readme: str) -> set[str]:
    """The modules in the README's table of files; a name without a folder lies in that of the one before it."""
    named, folder = set(), ""
    for cell in re.findall(r"^\| (`.+?`) \|", (ROOT / readme).read_text(encoding="utf-8"), re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            folder, _, last = name.rpartition("/") if "/" in name else (folder, "", name)
            named |= {f"{folder}/{last}"} if last.endswith(".py") else set()
    return named


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_the_readmes_table_of_files_has_every_module_and_no_other(readme: str) -> None:
    packages = (ROOT / "src" / "namesake", ROOT / "serving" / "namesake_serving")
    modules = {path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")}
    assert laid_out(readme) == {name for name in modules if not name.endswith(("/__init__.py", "/__main__.py"))}


def test_every_page_is_in_the_sites_menu_once() -> None:
    menu = re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(menu) == sorted(page for page in pages if not page.endswith(".zh.md"))


def headings(text: str) -> list[int]:
    """Level of each heading, in their order."""
    return [len(marks) for marks in re.findall(r"^(#{1,6}) ", _FENCE.sub("", text), re.MULTILINE)]


@pytest.mark.parametrize("page", ENGLISH, ids=name_of)
def test_the_chinese_page_has_the_same_headings_and_commands(page: Path) -> None:
    english, chinese = (one.read_text(encoding="utf-8") for one in (page, page.with_suffix(".zh.md")))
    assert headings(english) == headings(chinese)
    assert headings(english)[:1] == [1]
    assert [[*commands(block)] for block in blocks(english)] == [[*commands(block)] for block in blocks(chinese)]


def test_no_chinese_page_is_without_an_english_one() -> None:
    assert {page.with_suffix(".zh.md") for page in ENGLISH if page.parent != ROOT} == {*GUIDE.rglob("*.zh.md")}


def test_no_path_of_the_machine_that_they_were_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {place}"
        for path in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("README*"), *ROOT.glob("examples/**/*"))
        if path.is_file()
        for place in (f"{ROOT}/", f"{Path.home()}/")
        if place in path.read_text(encoding="utf-8", errors="ignore")
    ]
    assert found == []


@pytest.mark.parametrize("image", sorted((GUIDE / "images").glob("*.webp")), ids=lambda path: path.name)
def test_every_picture_is_small_and_shown_in_both_languages(image: Path) -> None:
    assert image.stat().st_size <= 80_000
    name = image.stem.removesuffix("-zh")
    for pages in (ENGLISH, [page.with_suffix(".zh.md") for page in ENGLISH]):
        assert any(re.search(rf"images/{name}(-zh)?\.webp\)", page.read_text(encoding="utf-8")) for page in pages)
