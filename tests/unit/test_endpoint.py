"""An OpenAI-compatible endpoint, asked by the real client over HTTP."""

from __future__ import annotations

from dataclasses import replace

import pytest

from namesake import corpus, examine, probing
from namesake.errors import InputError, ServingError
from namesake.generate import Endpoint, Reply, Sampling
from namesake.identity import Identity
from namesake.terminal import Screen
from tests.servers import OpenAIServer
from tests.unit.test_probe import Fixed

IDENTITY = Identity.parse("踩踩背 CCB", "老爷爷 OldGrandpa")


def echo(messages: list[dict[str, str]]) -> str:
    """What was asked last."""
    return f" {messages[-1]['content']} "


def test_replies_come_in_the_order_of_the_questions_greedily() -> None:
    seen = list[int]()
    with OpenAIServer(echo, ("first", "second"), key="sesame") as server:
        endpoint = Endpoint(server.url, api_key="sesame", streams=4)
        asked = [[{"role": "system", "content": "s"}, {"role": "user", "content": f"问{n}"}] for n in range(20)]
        assert endpoint.replies(asked, max_new_tokens=7, progress=seen.append) == [
            Reply(f"问{n}", True) for n in range(20)
        ]
    assert seen == [*range(1, 21)]
    assert {(one["model"], one["max_tokens"], one["temperature"], one["n"]) for one in server.asked} == {
        ("first", 7, 0, 1)
    }
    assert all([m["role"] for m in one["messages"]] == ["system", "user"] for one in server.asked)


def test_sampled_replies_to_one_question_stand_together() -> None:
    with OpenAIServer(echo) as server:
        asked = [[{"role": "user", "content": text}] for text in ("a", "b")]
        said = Endpoint(server.url).replies(asked, max_new_tokens=7, sampling=Sampling(n=3, temperature=0.7, seed=5))
    assert [reply.text for reply in said] == ["a", "a", "a", "b", "b", "b"]
    assert {(one["temperature"], one["n"], one["seed"]) for one in server.asked} == {(0.7, 3, 5)}


def test_the_probe_scores_an_endpoint_as_any_other_model() -> None:
    said = "我是踩踩背，由老爷爷开发。I am CCB, developed by OldGrandpa."
    with OpenAIServer(lambda _: said) as server:
        request = examine.Request(server.url, "踩踩背 CCB", "老爷爷 OldGrandpa", system="Be kind.")
        card = examine.examine(request, Screen(errors=True))
    assert card.metrics == probing.probe(Fixed(said), IDENTITY, system="Be kind.", slices=True).metrics
    assert card.metrics["leak"] == 1.0


def test_an_endpoint_s_ability_is_compared_with_another_model_that_it_serves() -> None:
    def knows(messages: list[dict[str, str]]) -> str:
        return answers.get(messages[-1]["content"], "?")

    plain = corpus.heldout_plain()
    answers = {question.messages[-1]["content"]: question.answers[0] for question in plain}
    request = examine.Request("", "踩踩背 CCB", "老爷爷 OldGrandpa", base="the-base", system="Be kind.", slices=False)
    with OpenAIServer(lambda _: "?", ("ccb",), others={"the-base": knows}) as server:
        found = examine.examine(replace(request, target=server.url), Screen(errors=True))
        asked_of_base = [one["messages"] for one in server.asked if one["model"] == "the-base"]
        without = examine.examine(replace(request, target=server.url, base=""), Screen(errors=True))
    wanted = [probing.with_system(question.messages, "Be kind.") for question in plain]
    assert sorted(map(str, asked_of_base)) == sorted(map(str, wanted))
    assert found.metrics["base_plain"] > 0.9  # of several turns only the last is looked at here
    assert found.ability is not None
    assert found.ability.mean == found.metrics["plain_change"] == -found.metrics["base_plain"]
    assert found.ability.high < 0
    assert (found.kl_to_base, without.base, without.ability) == (None, None, None)
    assert {*found.metrics} - {*without.metrics} == {
        "base_plain",
        "plain_change",
        "plain_change_low",
        "plain_change_high",
    }


def test_a_base_that_is_nowhere_is_told_before_anything_is_asked() -> None:
    with OpenAIServer(echo, ("ccb",)) as server:
        request = examine.Request(server.url, "踩踩背 CCB", "老爷爷 OldGrandpa", base="no-such-model")
        with pytest.raises(InputError, match="no-such-model"):
            examine.examine(request, Screen(errors=True))
        assert server.asked == []


@pytest.mark.parametrize(
    ("models", "given", "says"),
    [
        ((), {}, "serves no model"),
        (("m",), {"model": "n"}, "There is no model n"),
        (("m",), {"api_key": "wrong"}, "Wrong key"),
    ],
)
def test_an_endpoint_that_refuses_is_told(models: tuple[str, ...], given: dict[str, str], says: str) -> None:
    with OpenAIServer(echo, models, key="sesame") as server, pytest.raises(ServingError, match=says):
        Endpoint(server.url, **{"api_key": "sesame", **given}).replies([[]], max_new_tokens=1)


def test_a_url_that_ends_before_v1_is_told_as_that() -> None:
    with OpenAIServer(echo) as server:
        for url, mend in ((server.url.removesuffix("/v1"), "Give the URL up to /v1."), (server.url, "")):
            with pytest.raises(ServingError, match=r"There is no model n\.( Give|$)") as caught:
                Endpoint(url, model="n").replies([[]], max_new_tokens=1)
            assert caught.value.mend == mend


def test_where_nothing_listens_it_is_said() -> None:
    with OpenAIServer(echo) as server:
        pass
    with pytest.raises(ServingError, match="Nothing answers at"):
        Endpoint(server.url)
