"""What editors, git and GitHub read: it parses, keeps to its schema, and names tools and commands that exist."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from pre_commit.clientlib import load_config

from tests.unit.test_docs import commands, fault

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def of(path: Path) -> Any:
    """The file's content; ``on`` is the text that GitHub reads, not YAML 1.1's truth."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def steps(path: Path) -> list[dict[str, Any]]:
    """Every step of a workflow."""
    return [step for job in of(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        *((path, "github-workflows") for path in WORKFLOWS),
        *((path, "github-issue-forms") for path in FORMS),
        (ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml", "github-issue-config"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_github_reads_keeps_to_its_schema(path: Path, schema: str) -> None:
    vendored = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{schema}.json"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if True in content:
        content["on"] = content.pop(True)
    Draft7Validator(json.loads(vendored.read_text(encoding="utf-8"))).validate(content)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_of_a_workflow_is_understood(path: Path) -> None:
    given = {
        key.upper(): about["default"]
        for key, about in (of(path)["on"].get("workflow_dispatch") or {"inputs": {}})["inputs"].items()
    }
    scripts = [
        re.sub(r"\$(\w+)", lambda match: given.get(match[1], match[0]), step["run"])
        for step in steps(path)
        if "run" in step
    ]
    found = [words for script in scripts for words in commands(script)]
    assert not [f"{shlex.join(words)}: {told}" for words in found if (told := fault(words))]
    files = [word for script in scripts for word in shlex.split(script) if word.startswith(".ci/")]
    assert found or files
    assert all((ROOT / file).is_file() for file in files)


def test_the_sample_workflow_trains_judges_and_promotes_in_this_order() -> None:
    (path,) = (path for path in WORKFLOWS if path.name == "promote.yml")
    ran = [words[1] for step in steps(path) for words in commands(step.get("run", "")) if words[0] == "namesake"]
    assert ran == ["doctor", "run", "gate", "promote"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_little_and_writes_no_value_into_a_script(path: Path) -> None:
    workflow = of(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    assert not [step["run"] for step in steps(path) if "${{" in step.get("run", "")]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps(path) if "uses" in step)
    secrets = re.findall(r"\$\{\{ secrets\.(\w+) \}\}", path.read_text(encoding="utf-8"))
    assert all(name in path.read_text(encoding="utf-8").partition("\nname:")[0] for name in secrets)


def test_the_wrong_identity_form_asks_for_the_machine_and_the_scorecard() -> None:
    fields = {field["id"]: field for field in of(ROOT / ".github" / "ISSUE_TEMPLATE" / "wrong-identity.yml")["body"]}
    assert all(fields[name]["validations"]["required"] == "true" for name in ("replies", "scorecard", "doctor"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_the_commands_that_a_form_asks_for_exist(path: Path) -> None:
    spans = re.findall(r"`((?:namesake|make) [^`]+)`", path.read_text(encoding="utf-8"))
    assert spans or path.name == "feature.yml"
    assert not [told for span in spans for words in commands(span) if (told := fault(words))]


def test_the_hooks_run_what_make_check_runs_by_the_same_tools() -> None:
    hooks = [hook for repo in load_config(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    (recipe,) = re.findall(r"^check:.*\n((?:\t@.*\n)+)", MAKEFILE, re.MULTILINE)
    checks = [words[:2] for line in recipe.splitlines() if (words := line.strip("\t@").split())]
    entries = [hook["entry"].removeprefix(".venv/bin/").split() for hook in hooks]
    names = [words if words[0] == "ruff" else words[:1] for words in checks]
    assert [entry[: len(name)] for entry, name in zip(entries, names, strict=False)] == names
    pins = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    tools = {entry[0] for entry in entries} | {"pre-commit"}
    packages = {"lint-imports": "import-linter"}
    assert not [tool for tool in tools if f"\n{packages.get(tool, tool)}==" not in f"\n{pins}"]
    assert all(hook["language"] == "unsupported" for hook in hooks), "another language fetches its tools"


def test_the_editors_margins_are_ruffs() -> None:
    text = (ROOT / ".editorconfig").read_text(encoding="utf-8")
    parser = configparser.ConfigParser()
    parser.read_string(f"[top]\n{text}")
    assert parser["top"]["root"] == "true"
    assert int(parser["*.py"]["max_line_length"]) == PYPROJECT["tool"]["ruff"]["line-length"]
    assert parser["Makefile"]["indent_style"] == "tab"


def test_the_development_container_sets_up_as_make_does() -> None:
    made = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert PYPROJECT["project"]["requires-python"] == f">={made['image'].rpartition(':')[2]}"
    assert made["forwardPorts"] == [8000, 5000]
    assert made["hostRequirements"]["gpu"] == "optional"
    assert f"DEV_STAMP := $(VENV)/{Path('.venv/.installed-dev').name}" in MAKEFILE
    assert made["postCreateCommand"].startswith("make setup .venv/.installed-dev && ")
    schemas = made["customizations"]["vscode"]["settings"]["yaml.schemas"]
    assert all((ROOT / schema).is_file() and [*ROOT.glob(files)] for schema, files in schemas.items())
