"""Talking to a model from the terminal: an OpenAI-compatible endpoint, or a run's adapter on this machine."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from namesake.corpus import Message
from namesake.errors import ServingError
from namesake.messages import tr, translated
from namesake.probing import with_system

DEFAULT_URL = "http://127.0.0.1:8000/v1"
MAX_TOKENS = 512

Answer = Callable[[Sequence[Message]], Iterator[str]]
"""From a dialogue to the pieces of the reply as they come."""


def endpoint(url: str, *, model: str = "", api_key: str = "", temperature: float = 0.0) -> Answer:
    """Answers of an OpenAI-compatible endpoint, streamed. Without a model the endpoint's first one is taken."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0)

    def answer(dialogue: Sequence[Message]) -> Iterator[str]:
        begun = False
        try:
            name = model or _first(url, client.models.list().data)
            stream: Any = client.chat.completions.create(
                model=name,
                messages=list(dialogue),  # type: ignore[arg-type]
                stream=True,
                temperature=temperature,
            )
            begun = True
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except openai.APIConnectionError as error:
            if begun:
                raise ServingError("The connection was lost in the middle of the reply.", mend="Ask again.") from error
            raise ServingError(
                tr("Nothing answers at {url}.", url=url), mend="Start it with `namesake serve`, or give --url."
            ) from error
        except openai.APIError as error:
            from namesake.generate import refusal

            raise refusal(url, error) from error

    return answer


def _first(url: str, models: Sequence[Any]) -> str:
    """The first model that an endpoint lists; of ours no base that is there before any version is.

    Raises:
        ServingError: there is none.
    """
    for one in models:
        told = one.model_extra or {}
        if one.owned_by != "namesake" or told.get("root") != one.id or "namesake" in told:
            return str(one.id)
    raise ServingError(
        tr("{url} serves no model.", url=url), mend="A version may be on its way: `namesake status` tells. Or --model."
    )


def adapter(base: Path, folder: Path) -> Answer:
    """Answers of a base model with an adapter, on this machine, under the system prompt of its ``args.json``."""
    from namesake.generate import LocalModel

    model = LocalModel(base, folder, folded=True)
    settings = json.loads((folder / "args.json").read_text(encoding="utf-8"))

    def answer(dialogue: Sequence[Message]) -> Iterator[str]:
        own = any(message["role"] == "system" for message in dialogue)
        asked = list(dialogue) if own else with_system(dialogue, settings.get("system"))
        yield model.replies([asked], max_new_tokens=MAX_TOKENS)[0].text

    return answer


def once(answer: Answer, message: str, *, system: str | None = None) -> None:
    """Ask once and print the reply as it comes."""
    _say(answer(with_system([{"role": "user", "content": message}], system)))


def talk(answer: Answer, *, system: str | None = None) -> None:
    """A conversation with its history: ``/new`` starts again, ``/exit`` or Ctrl-D ends, Ctrl-C stops a reply."""
    import readline  # line editing and history for input()

    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one question, whatever lines it has
    signal.signal(signal.SIGINT, signal.default_int_handler)  # here Ctrl-C stops a reply, again and again
    print(translated("/new starts again, /exit or Ctrl-D ends, Ctrl-C stops a reply"), file=sys.stderr)
    history: list[Message] = with_system([], system)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/exit":
            return
        if text == "/new":
            history = with_system([], system)
        elif text:
            history.append({"role": "user", "content": text})
            try:
                history.append({"role": "assistant", "content": _say(answer(history))})
            except KeyboardInterrupt:
                print(translated("  (stopped)"))
                history.pop()
            except ServingError as error:
                print(error.told(), file=sys.stderr)
                history.pop()


def _say(pieces: Iterator[str]) -> str:
    said = []
    try:
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
    except ServingError:
        print(end="\n" if said else "")
        raise
    print()
    return "".join(said)
