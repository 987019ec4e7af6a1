"""The tree of errors: what a user reads and what a shell sees."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import errors
from namesake.errors import IdentityError, InputError, NamesakeError, shown

CLASSES: dict[str, type[NamesakeError]] = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, NamesakeError) and value.__module__ == errors.__name__
}


def drawn_tree() -> dict[str, tuple[str, int | None]]:
    """The tree in the docstring: class to parent and exit code."""
    found: dict[str, tuple[str, int | None]] = {}
    parents: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+Error)(?:\s+exit (\d+))?", line)
        if match:
            depth = len(match[1])
            parents[depth] = match[2]
            above = [parents[one] for one in sorted(parents) if one < depth]
            found[match[2]] = (above[-1] if above else "Exception", int(match[3]) if match[3] else None)
    return found


def test_the_tree_in_the_docstring_holds_every_class_under_its_parent() -> None:
    drawn = {name: parent for name, (parent, _) in drawn_tree().items()}
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in CLASSES.items()}


def test_the_exit_codes_in_the_docstring_are_the_classes_own_or_their_parents() -> None:
    drawn = drawn_tree()
    for name, (parent, code) in drawn.items():
        assert CLASSES[name].exit_code == (code if code is not None else drawn[parent][1]), name


def test_families_have_exit_codes_of_their_own_that_no_shell_uses() -> None:
    codes = [kind.exit_code for kind in CLASSES.values() if kind.__bases__[0] in {NamesakeError, Exception}]
    assert len(codes) == len(set(codes))
    assert all(0 < code < 126 for code in codes)


def test_a_message_is_followed_by_its_mend() -> None:
    assert str(NamesakeError("It broke.", mend="Mend it.")) == "It broke. Mend it."


def test_a_message_without_a_mend_has_no_space_at_its_end() -> None:
    assert str(NamesakeError("It broke.")) == "It broke."


def test_a_refused_value_is_named_shown_and_mended() -> None:
    error = InputError("port", "http", "is no number", mend="Give --port 8001.")
    assert str(error) == "port='http': is no number. Give --port 8001."
    assert (error.parameter, error.value, error.mend) == ("port", "http", "Give --port 8001.")


def test_the_kinds_of_bad_input_are_caught_as_input_errors() -> None:
    with pytest.raises(InputError) as caught:
        raise IdentityError("name", "x", "has no second half", mend="Write both.")
    assert caught.value.exit_code == 2


@given(st.text(max_size=7) | st.integers(-(10**9), 10**9) | st.none())
def test_a_short_value_is_shown_so_that_it_can_be_read_back(value: object) -> None:
    assert ast.literal_eval(shown(value)) == value


@given(st.text(min_size=90, max_size=2000))
def test_a_long_value_is_cut_and_its_length_told(value: str) -> None:
    text = shown(value)
    assert len(text) < 120
    assert text.endswith(f" ({len(value):,} characters)")


def test_of_a_long_path_the_file_s_name_is_shown() -> None:
    text = shown(f"/home/somebody/{'a folder of many/' * 10}the-file.jsonl")
    assert text.startswith("'/home/somebody/a folder")
    assert "…" in text
    assert "the-file.jsonl' (" in text


@given(st.text(alphabet=st.characters(categories=["Cc", "Cs", "Zl", "Zp"]), max_size=200))
def test_what_is_shown_is_one_line_that_every_terminal_can_print(value: str) -> None:
    text = shown(value)
    assert text.isprintable()
    assert text.encode("utf-8")
