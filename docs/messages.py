"""Collects what people read on the terminal into the Chinese catalogue, and compiles it: ``python docs/messages.py``.

Texts are found where the code hands them to a person: errors and their mends, :class:`namesake.terminal.Screen`, checks
of the doctor, ``--help``, and :func:`namesake.messages.tr`. Those that are gone leave the catalogue, new ones come in
without a translation; write it into the .po file and run this again. Tests fail until then.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from namesake import base_model, doctor, errors, messages, recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("src", "serving") for path in sorted((ROOT / folder).rglob("*.py"))]
PO = messages.LOCALES / messages.CHINESE / "LC_MESSAGES" / f"{messages.DOMAIN}.po"
MO = PO.with_suffix(".mo")

HEADER = """\
# What Namesake prints, in Chinese. Collected and compiled by docs/messages.py; the English text is the key.
"""

# Which positional arguments are texts for people, by the name of what is called.
_ERRORS = {
    name: 2 if issubclass(kind, errors.InputError) else 0
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.NamesakeError)
}
_CALLS: dict[str, tuple[int, ...]] = {
    **{name: (at,) for name, at in _ERRORS.items()},
    **dict.fromkeys(
        ("tr", "translated", "BadParameter", "line", "step", "warn", "result", "bar", "table", "_mapped", "refuse"),
        (0,),
    ),
    **dict.fromkeys(("Typer", "Option", "Argument"), ()),
    "Look": (0, 2),
    "disk": (0, 2),
    "_pinned": (0, 2),
    "_room": (0,),
    "_no_key": (2,),
    "_same": (0,),
    "_recomputed": (0,),
    "_refused": (1, 2),
    "Check": (0, 1, 2, 3),
}
_KEYWORDS = {"mend", "help", "title", "told"}

# What stands in variables, and what typer says of itself.
FURTHER = (
    base_model.EMBEDDED_MEND,
    *(look.mend for look in doctor.LOOKS),
    *(text for text in recipe.OURS.values() if not text.startswith("-")),
    *("promote", "rollback", "by hand"),  # how an alias was moved
    *("logged model", "folder", "file"),  # what may be left over
    "Arguments",
    "Options",
    "Commands",
    "(dynamic)",
    "required",
    "default: {default}",
    "env var: {var}",
    "Aborted!",
    "Missing command.",
    "No such command {name!r}.",
    "Install completion for the current shell.",
    "Show completion for the current shell, to copy it or customize the installation.",
    "Show this message and exit.",
)


def sinks(tree: ast.AST) -> Iterator[ast.expr]:
    """Texts of a module that people read: constants, and f-strings, which should be made by ``tr``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in {"faults.append", "reasons.append", "notes.append"}:
                yield from _texts(node.args[0])
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in _CALLS:
                continue
            if name == "tr" and not isinstance(node.args[0], ast.Constant):
                yield ast.JoinedStr([ast.Constant("a variable as template")], lineno=node.lineno, col_offset=0)
            given = [node.args[at] for at in _CALLS[name] if at < len(node.args)]
            given += [keyword.value for keyword in node.keywords if keyword.arg in _KEYWORDS]
            for one in given:
                yield from _texts(one)
            for keyword in (
                node.keywords if name == "tr" else ()
            ):  # phrases as values: tr(..., owner=owner or "nobody at all")
                texts = [one for one in _texts(keyword.value) if isinstance(one, ast.Constant)]
                yield from (one for one in texts if " " in str(one.value).strip())
        elif isinstance(node, ast.FunctionDef) and isinstance(node.body[0], ast.Expr):
            is_command = any("command" in ast.unparse(one) for one in node.decorator_list)
            yield from [node.body[0].value] if is_command else []  # its docstring is its help


def _texts(node: ast.expr) -> Iterator[ast.expr]:
    """The texts that an argument may be."""
    if isinstance(node, ast.IfExp):
        yield from (*_texts(node.body), *_texts(node.orelse))
    elif isinstance(node, ast.BoolOp):
        for part in node.values:
            yield from _texts(part)
    elif isinstance(node, ast.BinOp):
        yield from (*_texts(node.left), *_texts(node.right))
    elif isinstance(node, ast.Tuple | ast.List):
        for part in node.elts:
            yield from _texts(part)
    elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        yield node


def collected() -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Each text with where it stands, and the places whose f-string should be a ``tr``."""
    found: dict[str, list[tuple[str, int]]] = {}
    wrong = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        for node in sinks(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                text = str(node.value)
                text = inspect.cleandoc(text) if "\n    " in text else text
                if re.search("[A-Za-z]{2}", re.sub(r"{\w+[^}]*}", "", text)) or re.search(r"}\S", text):
                    found.setdefault(text, []).append((name, node.lineno))
            elif isinstance(node, ast.JoinedStr):
                words = "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
                if re.search("[A-Za-z]{2}", words):
                    wrong.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    for text in FURTHER:
        found.setdefault(text, [])
    return found, wrong


def catalogue() -> Catalog:
    """The committed catalogue."""
    with PO.open("rb") as stream:
        return read_po(stream, locale=messages.CHINESE)


def updated() -> Catalog:
    """The catalogue with the texts that the code has now, and the translations that are known."""
    known = {str(one.id): str(one.string) for one in catalogue() if one.id} if PO.is_file() else {}
    made = Catalog(locale=messages.CHINESE, header_comment=HEADER.rstrip(), fuzzy=False)
    for text, places in collected()[0].items():
        files = dict.fromkeys(name for name, _ in places)
        made.add(text, known.get(text, ""), locations=[(name, 0) for name in files])
    return made


def po(made: Catalog) -> bytes:
    """The catalogue as its file; no dates and line numbers, which change with every commit."""
    stream = BytesIO()
    write_po(stream, made, width=0, omit_header=True, include_lineno=False)
    return HEADER.encode() + b'msgid ""\nmsgstr "Content-Type: text/plain; charset=utf-8\\n"\n\n' + stream.getvalue()


def mo(made: Catalog) -> bytes:
    """The catalogue as the program reads it; the same at each time."""
    made.creation_date = made.revision_date = datetime(2026, 1, 1, tzinfo=UTC)
    stream = BytesIO()
    write_mo(stream, made)
    return stream.getvalue()


def main() -> None:
    """Write both files, and tell what is missing."""
    made = updated()
    PO.parent.mkdir(parents=True, exist_ok=True)
    PO.write_bytes(po(made))
    MO.write_bytes(mo(catalogue()))
    for one in made:
        if one.id and not one.string:
            print(f"! {PO.relative_to(ROOT)} has no: {one.id}", file=sys.stderr)
    for place in collected()[1]:
        print(f"! write tr(...) instead of an f-string: {place}", file=sys.stderr)


if __name__ == "__main__":
    main()
