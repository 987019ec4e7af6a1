"""What people read: English everywhere, Chinese on the terminal of those who want it, nothing untranslated."""

from __future__ import annotations

import copy
import json
import os
import re
import string
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from namesake import doctor, messages
from namesake.errors import InputError
from namesake.messages import joined, language, tr, translated
from namesake.terminal import Screen
from tests.unit.scripts import script

ROOT = Path(__file__).resolve().parents[2]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@cache
def known() -> dict[str, str]:
    """The committed catalogue."""
    return {str(one.id): str(one.string) for one in script("messages").catalogue() if one.id}


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESAKE_LANG", "zh")


# The catalogue.


def test_every_message_is_made_so_that_it_can_be_translated() -> None:
    _, wrong = script("messages").collected()
    assert not wrong, 'write tr("… {name} …", name=name) instead of the f-string:\n' + "\n".join(wrong)


def test_every_message_has_its_translation() -> None:
    texts = script("messages").collected()[0]
    missing = [f"{text!r} ({places})" for text, places in texts.items() if not known().get(text)]
    assert not missing, "\n".join(
        ["run `python docs/messages.py`, write msgstr in namesake.po, run it again, commit:", *missing]
    )
    gone = set(known()) - set(texts)
    assert not gone, f"run `python docs/messages.py`: no code says {gone}"


def fields(text: str) -> Counter[str]:
    """The placeholders of a template with their formats; all braces of a text that is none."""
    try:
        found = [(name, spec, how) for _, name, spec, how in string.Formatter().parse(text) if name is not None]
    except ValueError:
        return Counter(re.findall("[{}]", text))
    return Counter(f"{name}!{how}:{spec}" for name, spec, how in found)


def test_a_translation_has_the_placeholders_of_its_text() -> None:
    assert not [text for text, chinese in known().items() if fields(text) != fields(chinese)]


def test_a_translation_begins_and_ends_as_its_text_does() -> None:
    for text, chinese in known().items():
        assert re.match(r"[\r ]*", text)[0] == re.match(r"[\r ]*", chinese)[0], text  # type: ignore[index]
        assert text.count("\n") == chinese.count("\n"), text
        assert not (text.endswith(".") and chinese.endswith(".")), text


def test_what_is_a_command_or_a_name_is_the_same_in_both() -> None:
    keep = re.compile(r"`[^`]+`|--[a-z][a-z-]+|\b[A-Z]+_[A-Z_]+\b|models:/|\b(?:MLflow|vLLM|ModelScope)\b")
    for text, chinese in known().items():
        lost = [one for one in keep.findall(text) if one not in chinese and one != "--argument"]
        assert not lost, text


def test_the_compiled_catalogue_is_the_text_one() -> None:
    made = script("messages")
    assert made.MO.read_bytes() == made.mo(made.catalogue()), "run `python docs/messages.py` and commit"


def test_nothing_is_translated_twice() -> None:
    pages = yaml.safe_load((ROOT / "docs" / "reference.zh.yaml").read_text(encoding="utf-8"))
    assert not set(pages) & set(known()), "the pages take from the catalogue what is in it"


# The language.


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "zh-Hans"}, "zh"),
        ({"LANG": "zha_CN"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, "zh"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "zh_CN:en"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en:zh_CN"}, "en"),
        ({"LANGUAGE": "zh"}, "zh"),
        ({"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8", "LANGUAGE": "zh"}, "en"),
        ({"LC_ALL": "POSIX", "LANGUAGE": "zh"}, "en"),
        ({"NAMESAKE_LANG": "zh", "LC_ALL": "C"}, "zh"),
        ({"NAMESAKE_LANG": "en", "LC_ALL": "zh_CN.UTF-8", "LANGUAGE": "zh"}, "en"),
    ],
)
def test_the_language_is_the_locales_unless_it_is_said(
    environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NAMESAKE_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert language() == wanted


# Messages.


def test_a_message_is_its_english_text_for_everything_but_people(chinese: None) -> None:
    message = tr("There is no {uri}.", uri="models:/ccb/3")
    assert message == "There is no models:/ccb/3."
    assert f"{message}" == str(message) == json.loads(json.dumps(message))
    assert translated(message) == "没有 models:/ccb/3。"
    assert translated(copy.deepcopy(message)) == "没有 models:/ccb/3。"


def test_messages_in_messages_are_translated_and_texts_of_others_are_not(chinese: None) -> None:
    fault = joined([tr("{name} is missing", name="files"), tr("{name} has changed", name="is empty")])
    assert fault == "files is missing; is empty has changed"
    assert (
        translated(tr("{uri} is damaged: {faults}.", uri="passed", faults=fault))
        == "passed 已损坏：缺少 files；为空 已改变。"
    )
    assert translated(tr("no such {thing}", thing="{uri}")) == "no such {uri}"


def test_an_error_is_told_in_chinese_and_kept_in_english(chinese: None) -> None:
    error = InputError("name", "{x}", "is empty", mend="Give --name and --author.")
    assert str(error) == "name='{x}': is empty. Give --name and --author."
    assert error.told() == "错误：name='{x}'：为空。\n  补救：请给出 --name 和 --author。"


def test_translated_text_is_padded_by_columns(chinese: None) -> None:
    assert translated(tr("{text:8}|", text=tr("passed"))) == "通过    |"
    assert translated(tr("{text:>8}|", text=tr("passed"))) == "    通过|"
    assert translated(tr("{text:2}|", text=tr("passed"))) == "通过|"
    assert messages.cells("踩a，") == 5


# Real commands.


def namesake(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder without a store."""
    names = {"NAMESAKE_LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG", "PYTHONUTF8", "PYTHONIOENCODING"}
    kept = {key: value for key, value in os.environ.items() if key not in names | {"MLFLOW_TRACKING_URI"}}
    return subprocess.run(
        [sys.executable, "-m", "namesake", *words],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", **environment},
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "命令:\n"),
        (["promote", "--help"], 0, "通过之后要指向该版本的别名。  [默认：champion]"),
        (["prmote"], 2, "没有 'prmote' 这个命令"),
        (["promote", "--overide", "x"], 2, "错误：没有 --overide 这个选项（是否想写 --override？）"),
        (["probe"], 2, "缺少参数：'target'"),
        (["-q", "-v", "gc"], 2, "错误：-q 和 -v 不能同时使用。"),
        (["run", "--name", "踩踩背"], 2, "错误：name='踩踩背'：缺少后一半（英文名）。\n  补救：请写成"),
        (["run", "--learning_rat", "1"], 2, "learning_rat 不是 ms-swift 的参数（是否想写 learning_rate？）"),
        (["rollback", "--to", "x"], 2, "错误：to='x'：不是版本号。\n  补救：`namesake history` 会列出它们。"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_speaks_chinese_under_a_chinese_locale_and_english_under_c(
    words: list[str], code: int, said: str, tmp_path: Path
) -> None:
    done = namesake(tmp_path, *words, LC_ALL="zh_CN.UTF-8")  # which need not be installed
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert not re.search(r"\b(Usage|Options|Error|error|mend|Show this)\b", done.stdout + done.stderr)
    english = namesake(tmp_path, *words, LC_ALL="C.UTF-8")
    assert english.returncode == code
    assert not CHINESE.search(re.sub("踩踩背( CCB)?|老爷爷( OldGrandpa)?", "", english.stdout + english.stderr))


def test_a_terminal_that_cannot_show_chinese_gets_english(tmp_path: Path) -> None:
    done = namesake(tmp_path, "run", "--name", "x", LC_ALL="zh_CN.UTF-8", PYTHONIOENCODING="ascii")
    assert done.stderr.startswith("error: name='x': has no second half")


def test_what_goes_into_json_is_english_and_what_is_shown_is_not(
    chinese: None, capfd: pytest.CaptureFixture[str]
) -> None:
    looks = [
        doctor.Look("Python", doctor.python, "Run `make setup`."),
        doctor.Look("locale", lambda: time.sleep(9) or [], "Run `make setup`."),
    ]
    checks = doctor.examine(looks, seconds=0.2)
    doctor.show(checks, Screen())
    said = capfd.readouterr().out
    assert "故障     区域设置  0.2 秒内没有应答\n                   补救：" in said
    assert "故障：1，警告：0\n" in said
    assert not CHINESE.search(json.dumps(doctor.record(checks), ensure_ascii=False))


def test_help_waits_for_no_heavy_import(tmp_path: Path) -> None:
    program = """
import atexit, sys
from namesake.cli import main
atexit.register(lambda: print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr))
sys.argv = ["namesake", "--help"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert not {"mlflow", "torch", "transformers", "numpy", "yaml", "babel", "rich", "pydantic_settings"} & {
        *done.stderr.split()
    }
