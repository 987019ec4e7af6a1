"""What ``import namesake`` offers: all of it there, loaded when asked for, keywords like the commands' options."""

from __future__ import annotations

import ast
import inspect
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

import namesake
from namesake import api, cli, server
from namesake.errors import InputError, RecipeError, ServingError


def test_everything_that_is_named_is_there_and_documented() -> None:
    for name in namesake.__all__:
        assert inspect.getdoc(getattr(namesake, name)), name
    assert set(namesake.__all__) <= set(dir(namesake))
    assert namesake.errors.InputError is InputError
    with pytest.raises(AttributeError, match="tarin"):
        namesake.tarin  # noqa: B018


def test_what_types_say_is_what_is_loaded() -> None:
    tree = ast.parse(Path(namesake.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    loaded = {name: module for module, names in namesake._HOME.items() for name in names}
    assert typed.pop("errors") == "namesake"
    assert typed == loaded
    assert sorted(typed) == sorted(namesake.__all__)


def test_the_functions_are_not_hidden_by_modules() -> None:
    program = (
        "import namesake.api, namesake; print(*(type(getattr(namesake, name)).__name__ for name in namesake.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "module" not in done.stdout.split()


def test_importing_loads_nothing() -> None:
    program = "import sys; before = set(sys.modules); import namesake; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    assert [name for name in found if name.startswith("namesake.")] == []
    assert {name.partition(".")[0] for name in found} <= {"namesake", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("function", "command"),
    [(api.train, "run"), (api.probe, "probe"), (api.promote, "promote")],
    ids=["train", "probe", "promote"],
)
def test_keywords_are_the_commands_options(function: Any, command: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    options = {parameter.name for parameter in group.commands[command].params} - {"help", "as_json"}
    parameters = set(inspect.signature(function).parameters) - {"quiet", "overrides", "sign_password"}
    assert parameters == options
    defaults = {p.name: p.default for p in group.commands[command].params}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default not in (inspect.Parameter.empty, None) and name in options:
            assert parameter.default == defaults[name], name


def test_a_wrong_value_is_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no second half"):
        namesake.train("踩踩背", "老爷爷 OldGrandpa")
    with pytest.raises(RecipeError, match="learning_rte is no argument"):
        namesake.train("踩踩背 CCB", "老爷爷 OldGrandpa", learning_rte=1e-3)
    with pytest.raises(InputError, match="policy="):
        namesake.promote(policy=tmp_path / "none.yaml")
    with pytest.raises(InputError, match="no run id"):
        namesake.probe("nonsense")
    assert [*tmp_path.iterdir()] == []


def test_a_recipe_made_in_python_is_checked_like_a_file() -> None:
    recipe = namesake.load_recipe("default", learning_rate=1e-3, target_modules=["q_proj", "v_proj"], replay=7)
    assert recipe.sft["learning_rate"] == 0.001
    assert recipe.sft["target_modules"] == ["q_proj", "v_proj"]
    assert recipe.replay.prompts == 7
    own = namesake.Recipe("mine", "", ("namesake/self-cognition#8",), sft={"lora_rank": 4, "use_cpu": True})
    with pytest.raises(RecipeError, match="recipe='mine': use_cpu is not for a recipe"):
        namesake.load_recipe(own)


def test_options_of_the_server_are_flags() -> None:
    options: dict[str, server.Option] = {"eager": True, "poll_seconds": 0.5, "public_key": None, "require_gate": False}
    assert server.flags({**options, "engine_arg": ["--dtype=float32", "--seed=1"]}) == [
        "--eager",
        "--poll-seconds=0.5",
        "--engine-arg=--dtype=float32",
        "--engine-arg=--seed=1",
    ]


def test_a_server_that_is_refused_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with (
        pytest.raises(InputError, match=r"(?s)--no-such-option.*No such option"),
        namesake.serve(port=0, no_such_option=1),
    ):
        pass
    assert [*tmp_path.iterdir()] == []


def test_a_server_that_ends_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "command", lambda words: ["sh", "-c", "echo error: no such version; exit 6"])
    ended = namesake.serve(port=0)
    with pytest.raises(ServingError, match=r"(?s)exit code 6.*no such version"):
        ended.wait_ready(60)
    ended.stop()
    ended.stop()
    assert not ended.running()
    assert ended.log() == ""
    assert "stopped" in repr(ended)


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "command", lambda words: [sys.executable, "-c", "import time; time.sleep(60)"])
    waiting = namesake.serve(port=0)
    begun = time.monotonic()
    with pytest.raises(ServingError, match="Nothing answers"):
        waiting.wait_ready(0.3)
    pid = waiting.pid
    del waiting  # a handle that is forgotten stops its server
    assert time.monotonic() - begun < 10
    assert not Path(f"/proc/{pid}").exists()


def test_the_notebook_is_kept_as_it_was_executed_with_nothing_of_a_machine(root: Path) -> None:
    text = (root / "examples" / "tour.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert all(cell["outputs"] for cell in cells[1:])
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not re.findall(r"(?<![\w:.])/(?:home|root|tmp|work|usr|var|opt|mnt|Users)/", text)
    assert socket.gethostname() not in re.findall(r"[\w.-]+", json.dumps(outputs))


def test_a_server_is_never_somebody_elses_on_the_same_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="is taken"):
        server.Server(port=taken.getsockname()[1])
