"""TAB in real shells, over a real MLflow store."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pexpect
import pytest
from typer.testing import CliRunner

from namesake import completion, registry
from namesake.cli import app
from tests.unit.answers import answering

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

BIN = Path(sys.executable).parent
PROMPT = "ready> "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``mlflow.db`` with a registered model of two versions, an alias, and a run."""
    folder = tmp_path_factory.mktemp("store")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_registered_model("ccb", tags={registry.TAG_IDENTITY: "踩踩背 CCB"})
    for _ in range(2):
        client.create_model_version("ccb", str(folder))
    client.set_registered_model_alias("ccb", "champion", "1")
    client.create_run("0")
    (folder / "my-policy.yaml").touch()
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the folder, where MLflow finds its database by itself."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, folder: Path) -> Iterator[pexpect.spawn]:
    """An interactive shell in the folder in which ``namesake --install-completion`` has been called."""
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"there is no {request.param}")
    home = folder / request.param
    home.mkdir()
    inherited = {
        key: value for key, value in os.environ.items() if key not in {"MLFLOW_TRACKING_URI", "PROMPT_COMMAND"}
    }
    env = {
        **inherited,
        "HOME": str(home),
        "ZDOTDIR": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "dumb",
    }
    # A subshell, so that the shell is there when namesake looks for the one it was called from.
    subprocess.run([program, "-c", "(namesake --install-completion); true"], env=env, check=True, capture_output=True)
    running = pexpect.spawn(program, ["-i"], env=env, encoding="utf-8", dimensions=(40, 300), cwd=str(folder))
    running.sendline("bind 'set enable-bracketed-paste off' 2>/dev/null; PS1='rea''dy> '")
    running.expect(PROMPT)
    if request.param == "zsh":  # its first TAB only loads what typer has installed
        running.send("namesake \t")
        afresh(running)
    yield running
    running.close(force=True)


def afresh(shell: pexpect.spawn) -> None:
    """Drop the line and wait for the next prompt."""
    shell.sendcontrol("u")
    shell.send("\r")
    shell.expect(f"\r\n.*{PROMPT}", timeout=30)


@pytest.mark.parametrize(
    ("typed", "rest"),
    [
        pytest.param("namesake hist", "ory ", id="command"),
        pytest.param("namesake run --recipe tut", "orial ", id="recipe"),
        pytest.param("namesake history c", "cb ", id="model"),
        pytest.param("namesake promote --alias ch", "ampion ", id="alias"),
        pytest.param("namesake verify mod", "els:/ccb", id="reference"),
        pytest.param("namesake verify models:/ccb@", "champion ", id="at"),
        pytest.param("namesake serve models:/ccb@ch", "ampion ", id="serve"),
        pytest.param("namesake compare models:/ccb/1 models:/ccb@", "champion ", id="second"),
        pytest.param("namesake sweep --recipes default,tut", "orial ", id="recipes"),
        pytest.param("namesake gate x --policy my-po", "licy.yaml ", id="file"),
    ],
)
def test_tab_completes(shell: pexpect.spawn, typed: str, rest: str) -> None:
    shell.send(f"{typed}\t")
    try:
        shell.expect(f"{re.escape(typed)}\x07?{re.escape(rest)}", timeout=30)  # it may ring for more
    finally:
        afresh(shell)


@pytest.mark.usefixtures("here")
def test_every_kind_of_value_is_offered(folder: Path) -> None:
    (run,) = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_runs(["0"])
    assert completion.models("") == ["ccb"]
    assert completion.aliases("") == ["champion"]
    assert completion.versions("") == ["2", "1"]
    assert completion.references("") == ["models:/ccb@champion", "models:/ccb/2", "models:/ccb/1"]
    assert completion.runs(run.info.run_id[:4]) == [run.info.run_id]
    assert completion.targets("") == [*completion.references(""), run.info.run_id]
    assert completion.targets("x") == []


def test_recipes_and_spaces_are_those_that_come_along() -> None:
    assert completion.spaces("def") == ["default"]
    assert completion.several_recipes("tut") == ["tutorial"]
    assert completion.several_recipes("default,mine.yaml,t") == [
        f"default,mine.yaml,{name}" for name in ("thorough", "tutorial")
    ]
    assert completion.several_recipes("tutorial,tut") == []


def test_models_at_the_endpoint_on_the_line_are_offered() -> None:
    """As the shell asks, through typer: what stands before on the line counts."""
    body = json.dumps({"data": [{"id": "ccb"}, {"id": "ccb-v3"}, {"id": "base"}]}).encode()
    keys: list[str | None] = []
    with answering({"/v1/models": (200, body)}, asked=keys) as port:
        url = f"http://127.0.0.1:{port}/v1"
        for line, offered in {
            f"namesake chat --url {url} --api-key secret --model cc": ["ccb", "ccb-v3"],
            f"namesake probe {url} --model b": ["base"],
            "namesake probe models:/ccb/1 --model b": [],
            "namesake chat --url http://127.0.0.1:9/v1 --model c": [],
        }.items():
            asked = {"_NAMESAKE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
            done = CliRunner().invoke(app, [], prog_name="namesake", env=asked)
            assert re.findall(r'"([^":]+)"', done.output) == offered, line
    assert keys == ["Bearer secret", None]


@pytest.mark.parametrize("uri", ["sqlite:///nowhere.db", "http://127.0.0.1:9", "postgresql://u@h/d", "x", ""])
def test_without_a_store_nothing_is_offered_and_nothing_is_made(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert completion.targets("") == []
    assert completion.aliases("") == ["champion"]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "at", "joined", "cut"),
    [
        (["namesake", "verify", "models", ":", "/c"], 4, ["namesake", "verify", "/c"], "models:"),
        (["namesake", "verify", "models", ":"], 3, ["namesake", "verify", ""], "models:"),
        (["namesake", "verify", "models", ":", "/ccb", "@", "ch"], 6, ["namesake", "verify", "@ch"], "models:/ccb"),
        (["namesake", "verify", "models", ":", "/ccb@ch"], 4, ["namesake", "verify", "/ccb@ch"], "models:"),
        (["namesake", "promote", "--alias", "=", "ch"], 4, ["namesake", "promote", "--alias=ch"], ""),
        (["namesake", "promote", "--alias", ""], 3, ["namesake", "promote", "--alias", ""], ""),
    ],
)
def test_what_bash_splits_is_one_word_again(
    words: list[str], at: int, joined: list[str], cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_WORDS", "\n".join([*words, "after"]))
    monkeypatch.setenv("COMP_CWORD", str(at))
    monkeypatch.setattr(completion, "_cut", "")
    completion.join_words()
    assert os.environ["COMP_WORDS"].split("\n") == joined
    assert os.environ["COMP_CWORD"] == str(len(joined) - 1)
    assert completion._cut == cut
