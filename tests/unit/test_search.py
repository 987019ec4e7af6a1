"""Search spaces, what is tried next, what is given up, and which trial is best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from namesake import plots, recipe, search
from namesake.errors import InputError, RecipeError
from namesake.search import Parameter, Search, State, Trial

RATE = {"learning_rate": Parameter(low=1e-4, high=1e-2, log=True)}


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def trial(number: int, score: float | None = None, state: State = "complete", **early: float) -> Trial:
    """A trial that has ended; ``half=0.3`` is what it scored half way."""
    params = search.propose(Search(RATE, trials=99), [], number)
    return Trial(number, params, state, score, {{"half": 0.5, "late": 0.8}[key]: value for key, value in early.items()})


def test_a_space_is_read_with_its_defaults(tmp_path: Path) -> None:
    found = search.read(
        written(
            tmp_path,
            "trials: 5\nminutes: 90\nparameters:\n"
            "  learning_rate: {range: [1.0e-4, 1.0e-2], log: true}\n"
            "  replay: {range: [0, 800], step: 200}\n"
            "  replay.weight: {range: [0.5, 4]}\n"
            "  target_modules: {choices: [all-linear, [q_proj, v_proj]]}\n",
        )
    )
    assert (found.recipe, found.trials, found.minutes, found.at, found.after) == ("default", 5, 90, search.AT, 3)
    assert found.parameters["learning_rate"] == Parameter(low=1e-4, high=1e-2, log=True)
    assert found.parameters["replay"].values() == (0, 200, 400, 600, 800)
    assert found.parameters["target_modules"].choices == ("all-linear", "q_proj v_proj")
    assert not found.parameters["replay.weight"].whole


def test_a_space_goes_through_json_types_and_back(tmp_path: Path) -> None:
    found = search.read("default")
    assert Search.of_record(found.record()) == found


def test_every_shipped_space_can_be_read_and_has_the_recipe_itself_first() -> None:
    assert "default" in search.shipped()
    for name in search.shipped():
        found = search.read(name)
        plan = recipe.load(found.recipe)
        assert search.propose(found, [], 0) == {key: recipe.setting(plan, key) for key in found.parameters}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("parameters: {learning_rat: {choices: [1]}}", "learning_rat is no argument of ms-swift (did you mean"),
        ("parameters: {model: {choices: [a]}}", "model is not for a recipe"),
        ("parameters: {learning_rate: {range: [2.0e-3, 1.0e-3]}}", "range [0.002, 0.001] is empty"),
        ("parameters: {learning_rate: {range: [1.0e-3, 1.0e-3]}}", "is empty"),
        ("parameters: {learning_rate: {range: [1e-4, 1e-3]}}", "is not two numbers (YAML wants 1.0e-3"),
        ("parameters: {learning_rate: {range: [0.1]}}", "is not two numbers"),
        ("parameters: {learning_rate: {range: [0, 1], log: true}}", "has to begin above 0"),
        ("parameters: {lora_rank: {range: [4, 8], step: 5}}", "step 5 is wider"),
        ("parameters: {lora_rank: {range: [4, 8], step: 0}}", "step 0 is no number above 0"),
        ("parameters: {lora_rank: {range: [4.5, 8]}}", "lora_rank=4.5 is no whole number"),
        ("parameters: {lora_rank: {range: [4, 8], lag: true}}", "beside a range stand log"),
        ("parameters: {lora_rank: {choices: []}}", "empty list"),
        ("parameters: {lora_rank: {choices: [8, 8]}}", "not different"),
        ("parameters: {lora_rank: {choices: [{}]}}", "not different texts and numbers"),
        ("parameters: {lora_rank: 8}", "needs either choices or a range"),
        ("parameters: {lora_rank: {choices: [8], range: [1, 2]}}", "needs either choices or a range"),
        ("parameters: {replay.loss: {choices: [kl, mse]}}", "replay.loss=mse is none of kl, cross_entropy"),
        ("parameters: {replay: {range: [-1, 4]}}", "replay=-1 is less than none"),
        ("parameters: {recipe: {choices: [default, nothing]}}", "there is no such recipe"),
        ("recipe: nothing\nparameters: {lora_rank: {choices: [8]}}", "there is no such recipe"),
        ("parameters: {}", "has no parameters"),
        ("[1]", "has no parameters"),
        ("a: [", "cannot be read"),
        ("trails: 3\nparameters: {lora_rank: {choices: [8]}}", "trails is none of"),
        ("trials: 0\nparameters: {lora_rank: {choices: [8]}}", "trials=0 is no whole number from 1"),
        ("trials: 2.5\nparameters: {lora_rank: {choices: [8]}}", "trials=2.5 is no whole number"),
        ("minutes: -1\nparameters: {lora_rank: {choices: [8]}}", "minutes=-1"),
        ("prune: {at: [0.5, 0.2]}\nparameters: {lora_rank: {choices: [8]}}", "no rising row of fractions"),
        ("prune: {at: [1]}\nparameters: {lora_rank: {choices: [8]}}", "no rising row of fractions"),
        ("prune: {at: half}\nparameters: {lora_rank: {choices: [8]}}", "no rising row of fractions"),
        ("prune: {after: 0}\nparameters: {lora_rank: {choices: [8]}}", "prune.after=0"),
        ("prune: often\nparameters: {lora_rank: {choices: [8]}}", "neither false nor"),
    ],
)
def test_a_bad_space_is_refused_with_the_fault_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        search.read(written(tmp_path, text))
    assert says in str(caught.value)
    assert caught.value.mend


def test_every_fault_of_a_space_is_told_at_once(tmp_path: Path) -> None:
    text = "trials: 0\nparameters:\n  lora_rnk: {choices: [8]}\n  learning_rate: {range: [2.0, 1.0]}\n"
    with pytest.raises(InputError) as caught:
        search.read(written(tmp_path, text))
    assert all(words in str(caught.value) for words in ("trials=0", "lora_rnk", "is empty"))


def test_an_unknown_space_is_refused_with_those_there_are() -> None:
    with pytest.raises(InputError, match="default"):
        search.read("nowhere")


def test_recipes_are_tried_once_each_in_their_order() -> None:
    found = search.of_recipes(["tutorial", "default"])
    assert found.total == 2
    assert [search.propose(found, [], n) for n in range(2)] == [{"recipe": "tutorial"}, {"recipe": "default"}]
    with pytest.raises(InputError, match="different"):
        search.of_recipes(["default", "default"])
    with pytest.raises(RecipeError, match="no such recipe"):
        search.of_recipes(["nothing"])


def test_few_combinations_are_all_tried_and_no_trial_is_left_over() -> None:
    found = Search({"lora_rank": Parameter(choices=(4, 8)), "replay": Parameter(low=0, high=2)}, trials=9)
    assert found.total == 6
    tried = [search.propose(found, [], number) for number in range(6)]
    assert len({tuple(one.values()) for one in tried}) == 6


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=0, max_size=7), st.integers(0, 99))
def test_what_is_proposed_lies_in_the_space_and_is_the_same_when_asked_again(scores: list[float], seed: int) -> None:
    space = {**RATE, "lora_rank": Parameter(low=4, high=16, step=4), "replay.loss": Parameter(choices=("kl", "x"))}
    found = Search(space, recipe="tutorial", trials=8, seed=seed)
    before: list[Trial] = []
    for number, score in enumerate(scores):
        before.append(Trial(number, search.propose(found, before, number), "complete", score))
    again = search.propose(found, list(reversed(before)), len(before))
    assert again == search.propose(found, before, len(before))
    for name, value in again.items():
        assert space[name].holds(value), (name, value)


def test_after_the_even_draws_the_search_goes_where_the_scores_are_better() -> None:
    found = Search(RATE, recipe="default", trials=40)
    trials: list[Trial] = []
    for number in range(40):
        params = search.propose(found, trials, number)
        off = abs(math.log10(float(params["learning_rate"])) + 2.2)
        trials.append(Trial(number, params, "complete", -off))
    first, last = ([-t.score for t in part if t.score is not None] for part in (trials[:14], trials[26:]))
    assert sum(last) / len(last) < sum(first) / len(first) / 2


@pytest.mark.parametrize(
    ("early", "given_up"),
    [({0.5: 0.1}, True), ({0.5: 0.3}, False), ({0.5: 0.9}, False), ({0.5: 0.3, 0.8: 0.4}, True), ({}, False)],
)
def test_a_training_below_the_median_of_the_finished_is_given_up(early: dict[float, float], given_up: bool) -> None:
    before = [trial(0, 0.9, half=0.2, late=0.5), trial(1, 0.9, half=0.3, late=0.6), trial(2, 0.9, half=0.4, late=0.7)]
    assert search.hopeless(Search(RATE, trials=99), before, early) is given_up


def test_nothing_is_given_up_before_enough_trials_have_finished() -> None:
    before = [trial(0, 0.9, half=0.5), trial(1, 0.9, half=0.5), trial(2, None, "pruned", half=0.1)]
    assert not search.hopeless(Search(RATE, trials=99), before, {0.5: 0.0})
    assert search.hopeless(Search(RATE, trials=99, after=2), before, {0.5: 0.0})


def test_the_best_comes_first_the_earlier_of_equals_then_pruned_then_failed() -> None:
    trials = [
        trial(0, None, "failed"),
        trial(1, None, "pruned", half=0.1),
        trial(2, 0.5),
        trial(3, 0.9),
        trial(4, None, "pruned", half=0.3),
        trial(5, 0.9),
    ]
    assert [one.number for one in search.ranked(trials)] == [3, 5, 2, 4, 1, 0]


def test_what_moves_the_score_is_told_once_enough_trials_have_finished() -> None:
    space = {**RATE, "lora_rank": Parameter(choices=(4, 8, 16))}
    found = Search(space, recipe="tutorial", trials=50)
    trials = []
    for number in range(12):
        params = search.propose(found, [], number)
        trials.append(Trial(number, params, "complete", math.log10(float(params["learning_rate"]))))
    shares = search.importances(found, trials)
    assert next(iter(shares)) == "learning_rate"
    assert sum(shares.values()) == pytest.approx(1)
    assert search.importances(found, trials[:3]) == {}
    assert search.importances(found, [trial(n, 0.5) for n in range(5)]) == {}


def test_the_plots_are_png_show_every_trial_and_are_the_same_again() -> None:
    found = Search({**RATE, "recipe": Parameter(choices=("default", "/a/很长/$x$/tutorial.yaml"))}, trials=9)
    trials = [
        Trial(0, {"learning_rate": 1e-3, "recipe": "default"}, "complete", 0.5),
        Trial(1, {"learning_rate": 1e-2, "recipe": "/a/很长/$x$/tutorial.yaml"}, "pruned", None, {0.5: 0.1}),
        Trial(2, {"learning_rate": 1e-2, "recipe": "default"}, "failed"),
    ]
    made = plots.plots(found, trials, {})
    assert list(made) == ["parallel-coordinates.png"]
    assert made["parallel-coordinates.png"].startswith(b"\x89PNG")
    assert made == plots.plots(found, trials, {})
    assert made != plots.plots(found, trials[:1], {})
    assert list(plots.plots(found, [], {"learning_rate": 1.0})) == ["parallel-coordinates.png", "importances.png"]
