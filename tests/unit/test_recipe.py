"""Recipes: what ships, what overrides do, and that every fault is told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from namesake import corpus, dataset, recipe
from namesake.errors import NamesakeError, RecipeError
from namesake.recipe import OURS, Recipe, Replay

TUTORIAL = {
    "tuner_type": "lora",
    "torch_dtype": "bfloat16",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "learning_rate": 1e-4,
    "lora_rank": 8,
    "lora_alpha": 32,
    "target_modules": ["all-linear"],
    "gradient_accumulation_steps": 16,
    "eval_steps": 50,
    "save_steps": 50,
    "save_total_limit": 2,
    "logging_steps": 5,
    "max_length": 2048,
    "output_dir": "output",
    "system": "You are a helpful assistant.",
    "warmup_ratio": 0.05,
    "dataloader_num_workers": 4,
}
"""The arguments of the tutorial's ``swift sft``."""

KEYS = st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True)
VALUES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: not text.startswith("--"))


@pytest.fixture
def write(tmp_path: Path) -> Path:
    """Where a recipe of the test's own is written."""
    return tmp_path / "mine.yaml"


def load(path: Path, text: str, **overrides: str) -> Recipe:
    """The recipe of the text."""
    path.write_text(text, encoding="utf-8")
    return recipe.load(str(path), overrides=overrides)


def test_default_and_tutorial_are_shipped() -> None:
    assert {"default", "tutorial"} <= set(recipe.shipped())


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_every_shipped_recipe_loads_and_says_what_it_is_for(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.about
    assert loaded.system
    assert all(one.startswith(dataset.BUILTIN) for one in loaded.dataset)
    assert loaded.argv()


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_every_shipped_recipe_says_the_same_when_its_command_line_is_read_again(name: str) -> None:
    loaded = recipe.load(name)
    assert recipe.load(name, overrides=recipe.pairs(loaded.argv())) == loaded


def test_the_tutorial_recipe_has_the_tutorials_value_of_every_argument() -> None:
    sft = dict(recipe.load("tutorial").sft)
    assert {key: sft.get(key) for key in TUTORIAL} == TUTORIAL


def test_the_tutorial_recipe_adds_only_what_was_a_default_when_the_tutorial_was_written() -> None:
    loaded = recipe.load("tutorial")
    assert set(loaded.sft) - set(TUTORIAL) == {"split_dataset_ratio"}
    assert loaded.replay == Replay(prompts=0)
    assert loaded.dataset == (f"{dataset.BUILTIN}#500",)


def test_the_default_recipe_mixes_in_replay() -> None:
    assert recipe.load("default").replay.prompts > 0


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "1e-3", 1e-3),
        ("learning_rate", " 0.5 ", 0.5),
        ("lora_rank", "16", 16),
        ("packing", "true", True),
        ("packing", "False", False),
        ("target_modules", "q_proj v_proj", ["q_proj", "v_proj"]),
        ("system", ' You\'re "it", 踩踩背 ', ' You\'re "it", 踩踩背 '),
        ("output_dir", "8", "8"),
    ],
)
def test_an_override_becomes_a_value_of_the_arguments_type(key: str, text: str, value: object) -> None:
    found = recipe.load("tutorial", overrides={key: text}).sft[key]
    assert found == value
    assert type(found) is type(value)


def test_an_override_replaces_the_recipes_value_and_leaves_the_others() -> None:
    before, after = recipe.load("tutorial"), recipe.load("tutorial", overrides={"lora_rank": "16"})
    assert {**before.sft, "lora_rank": 16} == dict(after.sft)


def test_a_single_override_goes_over_the_args_text() -> None:
    loaded = recipe.load("tutorial", overrides={"lora_rank": "4"}, args="--lora_rank 16 --lora_alpha 64")
    assert (loaded.sft["lora_rank"], loaded.sft["lora_alpha"]) == (4, 64)


def test_modules_that_are_asked_for_replace_the_recipes_pattern_which_would_win_over_them() -> None:
    assert "target_regex" in recipe.load("default").sft
    for args in ("--target_modules q_proj", "--lora_target_modules q_proj"):
        loaded = recipe.load("default", args=args)
        assert loaded.sft["target_modules"] == ["q_proj"]
        assert "target_regex" not in loaded.sft
    both = recipe.load("default", args="--target_modules q_proj --target_regex .*_proj").sft
    assert (both["target_modules"], both["target_regex"]) == (["q_proj"], ".*_proj")


def test_replay_can_be_set_and_switched_off() -> None:
    assert recipe.load("default", overrides={"replay": "0"}).replay.prompts == 0
    assert recipe.load("tutorial", args="--replay 40").replay.prompts == 40


def test_the_old_spellings_mean_the_new_arguments() -> None:
    loaded = recipe.load(
        "tutorial", args="--train_type adalora --ckpt_dir a/checkpoint-1 --lora_target_modules q_proj k_proj"
    )
    assert loaded.sft["tuner_type"] == "adalora"
    assert loaded.sft["adapters"] == ["a/checkpoint-1"]
    assert loaded.sft["target_modules"] == ["q_proj", "k_proj"]
    assert "train_type" not in loaded.sft


def test_a_training_that_leaves_no_adapter_is_refused_before_it_begins() -> None:
    for args in ("--tuner_type full", "--train_type full --replay.loss cross_entropy"):
        with pytest.raises(RecipeError, match="makes no adapter"):
            recipe.load("default", args=args)
        with pytest.raises(RecipeError, match="makes no adapter"):
            recipe.load("tutorial", args=args)


def test_a_start_that_changes_the_base_is_refused_where_the_base_is_what_is_learnt_from() -> None:
    for start in ("pissa", "pissa_niter_16", "olora", "lora-ga"):
        with pytest.raises(RecipeError, match=f"init_weights={start} changes the base"):
            recipe.load("default", args=f"--init_weights {start}")
        assert recipe.load("default", args=f"--init_weights {start} --replay.loss cross_entropy").sft
    for start in ("true", "false", "gaussian"):
        assert recipe.load("default", args=f"--init_weights {start}").sft["init_weights"] == start


def test_the_system_prompt_is_the_one_that_ms_swift_trains_under(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("你是客服。\nBe kind.\n", encoding="utf-8")
    assert recipe.load("default", overrides={"system": str(file)}).system == "你是客服。\nBe kind."
    assert recipe.load("default", overrides={"system": "One\\nTwo"}).system == "One\nTwo"
    assert recipe.load("default", overrides={"system": ""}).system == ""
    for system, fault in (
        (str(tmp_path / "gone.txt"), "cannot be read"),
        ("x" * 6001, "longer than the 6000 characters"),
    ):
        with pytest.raises(RecipeError, match=fault):
            recipe.load("default", overrides={"system": system})
    file.write_text("see prompt.txt", encoding="utf-8")
    with pytest.raises(RecipeError, match="read as a file again"):
        recipe.load("default", overrides={"system": str(file)})


def test_what_was_resolved_is_resolved_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(r"C:\new and \\n", encoding="utf-8")
    once = recipe.load("default", overrides={"system": str(file)})
    assert recipe.load(once).system == once.system


def test_the_old_spellings_are_understood_in_a_recipe_file_too(write: Path) -> None:
    assert dict(load(write, "sft: {train_type: lora}").sft) == {"tuner_type": "lora"}


def test_a_file_of_ones_own_is_read_and_called_after_the_file(write: Path) -> None:
    loaded = load(write, "about: Mine.\ndataset: [a.jsonl, 'b#5']\nreplay: {prompts: 7}\nsft: {learning_rate: 1e-4}")
    assert (loaded.name, loaded.about, loaded.dataset) == ("mine", "Mine.", ("a.jsonl", "b#5"))
    assert loaded.replay == Replay(prompts=7, max_new_tokens=64)
    assert loaded.sft == {"learning_rate": 1e-4}


def test_several_data_sets_can_stand_in_one_text(write: Path) -> None:
    assert load(write, "dataset: a.jsonl b#5").dataset == ("a.jsonl", "b#5")


def test_several_faults_come_in_one_message() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(
            "default",
            overrides={"lora_rank": "eight", "model": "x"},
            args="--packing maybe --learning_rate inf --warmup_ratio lots --nonsense 1 --replay some",
        )
    message = str(caught.value)
    for key in ("lora_rank=eight", "model", "packing=maybe", "learning_rate=inf", "warmup_ratio=lots", "nonsense"):
        assert key in message
    assert "replay=some" in message


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("learning_rat", "learning_rate"), ("lora_ranks", "lora_rank"), ("train_typ", "train_type"), ("repaly", "replay")],
)
def test_an_unknown_argument_suggests_the_close_one(typed: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=rf"{typed} is no argument of ms-swift \(did you mean {meant}\?\)"):
        recipe.load("default", overrides={typed: "1"})


def test_an_argument_like_nothing_known_is_refused_without_a_suggestion() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load("default", overrides={"zzzzqqqq": "1"})
    assert "zzzzqqqq is no argument" in str(caught.value)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(OURS))
def test_an_argument_that_namesake_gives_itself_is_refused_and_its_own_way_told(key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load("default", overrides={key: "true"})
    assert f"{key} is not for a recipe, use {OURS[key]}" in str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match="not finite"):
        recipe.load("default", overrides={"learning_rate": value})


@pytest.mark.parametrize("value", ["", "1.5", "1e3", "eight", "0x10"])
def test_a_whole_number_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(RecipeError, match="no whole number"):
        recipe.load("default", overrides={"lora_rank": value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n- b\n",
        "just text",
        "sft: [a]",
        "sft: text",
        "extra: 1",
        "a: [",
        "sft: {lora_rank: true}",
        "sft: {lora_rank: eight}",
        "sft: {nonsense: 1}",
        "sft: {model: x}",
        "replay: 200",
        "replay: {promts: 3}",
        pytest.param(
            "sft: {lora_rank: 8.5}",
        ),
        pytest.param(
            "sft: {lora_rank: [1, 2]}",
        ),
        pytest.param(
            "sft: {learning_rate: .nan}",
        ),
        pytest.param(
            "sft: {on: 1}",
        ),
        pytest.param(
            "replay: {prompts: lots}",
        ),
        pytest.param(
            "replay: {prompts: -3}",
        ),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(write: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        load(write, text)


@pytest.mark.parametrize("weight", ["0", "-1", "true", ".inf", ".nan", "much"])
@pytest.mark.parametrize("key", ["weight", "opening_weight"])
def test_what_is_no_weight_is_refused(tmp_path: Path, key: str, weight: str) -> None:
    with pytest.raises(RecipeError, match=rf"own\.yaml'.*: replay\.{key}=[^ ]+ is (no number|not )"):
        load(tmp_path / "own.yaml", f"replay: {{prompts: 5, {key}: {weight}}}\nsft: {{}}\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("replay: {promts: 3}", "replay.promts is nothing that a recipe has"),
        (
            "replay: {prompts: -3, loss: mse}",
            "replay=-3 is less than none; replay.loss=mse is none of kl, cross_entropy",
        ),
        ("replay: 200", "replay=200 is of the wrong kind"),
        ("other_systems: 2.5", "other_systems=2.5 is no whole number"),
        ("held_out: 1.5", "held_out=1.5 is greater than 1"),
        ("dataset: [1]", "dataset.0=1 is of the wrong kind"),
    ],
)
def test_a_wrong_value_in_a_file_is_named(write: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write, text)
    assert f": {says}. " in str(caught.value)


@pytest.mark.parametrize("wrong", [{"prompts": -1}, {"prompts": True}, {"loss": "mse"}, {"weight": 0}, {"promts": 3}])
def test_a_replay_made_in_python_is_checked_as_one_in_a_file(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Replay"):
        Replay(**wrong)


def test_the_loss_is_told_its_weights_only_where_it_is_used(tmp_path: Path) -> None:
    path, text = tmp_path / "own.yaml", "replay: {prompts: 5, weight: 2, opening_weight: 1.5}\nsft: {}\n"
    told = {"NAMESAKE_REPLAY_WEIGHT": "2", "NAMESAKE_REPLAY_OPENING_WEIGHT": "1.5"}
    assert load(path, text).replay.environment == told
    assert load(path, text, replay="0").replay.environment == {}


def test_a_negative_number_of_replay_prompts_is_refused() -> None:
    with pytest.raises(RecipeError, match="replay"):
        recipe.load("default", overrides={"replay": "-5"})


def test_replay_and_other_systems_can_be_overridden_one_by_one() -> None:
    given = {"replay.weight": "2", "replay.opening_weight": "1.5", "replay.loss": "kl", "replay.max_new_tokens": "8"}
    loaded = recipe.load("default", overrides={**given, "other_systems": "6"})
    assert loaded.replay == recipe.Replay(recipe.load("default").replay.prompts, 8, "kl", 2.0, 1.5)
    assert loaded.other_systems == 6
    for key, value in given.items():
        assert str(recipe.setting(loaded, key)) in {value, f"{value}.0"}
    assert recipe.setting(loaded, "train_type") == "lora"
    assert recipe.setting(loaded, "replay") == loaded.replay.prompts


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", "0"), ("weight", "x"), ("opening_weight", "-1"), ("loss", "mse"), ("max_new_tokens", "2.5")],
)
def test_a_wrong_value_for_replay_is_refused_by_its_name(key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=rf"replay\.{key}={value}"):
        recipe.load("default", overrides={f"replay.{key}": value})


def test_an_argument_left_empty_in_a_file_is_not_the_word_none(write: Path) -> None:
    try:
        loaded = load(write, "sft:\n  system:\n")
    except RecipeError:
        return
    assert loaded.system is None


def test_a_data_set_left_empty_in_a_file_is_none_at_all(write: Path) -> None:
    assert load(write, "dataset:\n").dataset == ()


def test_a_file_that_is_no_text_is_refused(write: Path) -> None:
    write.write_bytes(b"\xff\xfe\x00sft")
    with pytest.raises(RecipeError, match="is not YAML"):
        recipe.load(str(write))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nonsense",
        "/",
        ".",
        "$(touch x)",
        "../recipes",
        "a\0b",
        "no\nsuch.yaml",
        pytest.param(
            "x" * 10_000,
            id="10000 characters",
        ),
        pytest.param(
            "~nosuchuser/x.yaml",
        ),
    ],
)
def test_a_name_that_is_no_recipe_is_refused_and_the_shipped_ones_told(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(name)
    assert "default, thorough, tutorial" in caught.value.mend
    assert len(caught.value.message) < 300


@given(KEYS, st.text(max_size=30))
def test_any_override_is_taken_or_refused_as_a_recipe_error(key: str, value: str) -> None:
    try:
        loaded = recipe.load("tutorial", overrides={key: value})
    except NamesakeError as error:
        assert isinstance(error, RecipeError)
    else:
        assert isinstance(loaded, Recipe)
        assert key in recipe.known_arguments() or key in recipe.OLD_SPELLINGS or key == "replay"


@given(st.sampled_from(sorted(recipe.known_arguments().keys() - OURS.keys())), st.text(max_size=12))
def test_any_value_of_a_known_argument_has_the_arguments_type_or_is_refused(key: str, value: str) -> None:
    kinds: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "list": list}
    try:
        loaded = recipe.load("tutorial", overrides={key: value})
    except RecipeError as error:
        assert key in str(error)
    else:
        assert type(loaded.sft[recipe.OLD_SPELLINGS.get(key, key)]) is kinds[recipe.known_arguments()[key]]


def test_the_args_text_is_split_like_a_shell_does_it() -> None:
    line = """--system 'You are "it".' --output_dir=a=b --packing --target_modules q v --lora-rank 3 --seed -1"""
    assert recipe.parse_args(line) == {
        "system": 'You are "it".',
        "output_dir": "a=b",
        "packing": "true",
        "target_modules": "q v",
        "lora_rank": "3",
        "seed": "-1",
    }


def test_nothing_in_the_args_text_is_run_or_expanded() -> None:
    assert recipe.parse_args("--system $(touch x)$HOME*") == {"system": "$(touch x)$HOME*"}


@pytest.mark.parametrize("line", ["--system 'open", '--system "open', "--system \\"])
def test_an_args_text_with_open_quotes_is_refused(line: str) -> None:
    with pytest.raises(RecipeError, match="cannot be split"):
        recipe.parse_args(line)


@pytest.mark.parametrize("words", [["x"], ["x", "--a", "1"], ["-a", "1"], ["--"]])
def test_a_word_before_any_argument_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="stands before any --argument"):
        recipe.pairs(words)


@given(st.dictionaries(KEYS, st.lists(VALUES, min_size=1, max_size=4), max_size=6))
def test_pairs_read_back_every_key_with_its_values(given: dict[str, list[str]]) -> None:
    words = [word for key, values in given.items() for word in (f"--{key}", *values)]
    assert recipe.pairs(words) == {key: " ".join(values) for key, values in given.items()}


@given(st.dictionaries(KEYS, st.text(max_size=20), max_size=6))
def test_pairs_read_back_what_is_joined_with_an_equals_sign_whatever_it_is(given: dict[str, str]) -> None:
    assert recipe.pairs([f"--{key}={value}" for key, value in given.items()]) == given


@given(st.lists(KEYS, unique=True, max_size=6))
def test_keys_without_values_are_true(keys: list[str]) -> None:
    assert recipe.pairs([f"--{key}" for key in keys]) == dict.fromkeys(keys, "true")


@given(st.lists(st.text(max_size=12)))
def test_any_words_are_pairs_or_refused_as_a_recipe_error(words: list[str]) -> None:
    try:
        found = recipe.pairs(words)
    except RecipeError:
        assert not words[0].startswith("--") or words[0] == "--" or words[0].startswith("--=")
    else:
        assert all(isinstance(value, str) for value in found.values())


def test_lists_and_switches_become_words_of_the_command_line() -> None:
    assert recipe.to_argv({"target_modules": ["q", "v"], "packing": True, "lazy_tokenize": False, "lora_rank": 8}) == [
        "--target_modules",
        "q",
        "v",
        "--packing",
        "true",
        "--lazy_tokenize",
        "false",
        "--lora_rank",
        "8",
    ]


def test_the_known_arguments_have_known_types_and_hold_the_tutorials() -> None:
    known = recipe.known_arguments()
    assert set(known.values()) == {"int", "float", "bool", "str", "list"}
    assert set(TUTORIAL) <= set(known)
    assert set(recipe.OLD_SPELLINGS.values()) <= set(known)


@pytest.mark.parametrize(("key", "value"), [("torch_dtype", "bf16"), ("padding_side", "middle"), ("quant_bits", "5")])
def test_a_value_that_ms_swift_does_not_offer_is_refused_with_those_it_does(key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}={value} is none of {', '.join(recipe.choices()[key])}"):
        recipe.load("tutorial", overrides={key: value})
    assert recipe.load("tutorial", overrides={key: recipe.choices()[key][0]}).sft[key] == recipe.choices()[key][0]


def test_rows_under_other_system_prompts_are_a_whole_number(write: Path) -> None:
    assert load(write, "other_systems: 6\nsft: {}").other_systems == 6
    assert load(write, "sft: {}").other_systems == 0
    for text in ("-1", "1.5", "true", "many"):
        with pytest.raises(RecipeError, match="other_systems"):
            load(write, f"other_systems: {text}\nsft: {{}}")


def test_the_default_recipe_leaves_the_order_of_the_rows_to_the_file() -> None:
    sft = recipe.load("default").sft
    assert sft["train_dataloader_shuffle"] is False
    assert sft["dataset_shuffle"] is False


def test_a_share_of_the_held_out_questions_is_a_share() -> None:
    assert recipe.load("default").held_out == 1.0
    assert recipe.load("default", overrides={"held_out": "0.25"}).held_out == 0.25
    for text in ("0", "1.5", "-1", "some"):
        with pytest.raises(RecipeError, match="held_out"):
            recipe.load("default", overrides={"held_out": text})


def test_the_thorough_recipe_is_the_default_with_all_of_the_corpus() -> None:
    default, thorough = recipe.load("default"), recipe.load("thorough")
    assert thorough.sft == default.sft
    assert vars(thorough.replay) == {**vars(default.replay), "prompts": len(corpus.plain_prompts())}
