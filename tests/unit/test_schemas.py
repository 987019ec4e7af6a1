"""The schemas by which editors check recipes, search spaces and policies: up to date, of one mind with the code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pre_commit.clientlib import load_config

from namesake import recipe, search
from namesake.errors import InputError
from namesake.gate import load_policy
from tests.unit.scripts import script

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "policies").rglob("*.yaml"))]
KINDS = ("recipe", "space", "policy")


@cache
def checker(kind: str) -> Draft202012Validator:
    """What checks by a committed schema."""
    path = next(path for path in script("schemas").schemas() if path.name == f"{kind}.schema.json")
    return Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))


def reader(kind: str) -> Callable[[Path], object]:
    """The code that reads such a file."""
    readers: dict[str, Callable[[Path], object]] = {
        "recipe": lambda path: recipe.load(str(path)),
        "space": lambda path: search.read(str(path)),
        "policy": load_policy,
    }
    return readers[kind]


def read(kind: str, text: str, folder: Path) -> bool:
    """Whether the code takes it."""
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        reader(kind)(path)
    except InputError:
        return False
    return True


def test_the_committed_schemas_are_what_the_code_says() -> None:
    stale = [
        path.name for path, text in script("schemas").schemas().items() if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"run `make generate` and commit: {', '.join(stale)}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_keeps_to_the_draft_it_names_and_says_what_each_field_is(kind: str) -> None:
    schema = checker(kind).schema
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(schema)

    def undescribed(properties: dict[str, Any]) -> Iterator[str]:
        for name, field in properties.items():
            if not field.get("description"):
                yield name
            yield from undescribed(field.get("properties", {}))

    assert not [*undescribed(schema["properties"])]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_shipped_file_names_its_schema_and_keeps_to_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named, "an editor finds the schema by this first line"
    schema = json.loads((path.parent / named[1]).read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(yaml.safe_load(text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_hook_checks_a_shipped_file_by_the_schema_that_it_names_and_it_passes(path: Path) -> None:
    hooks = [hook for repo in load_config(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    schemas = [
        ROOT / hook["entry"].partition("--schemafile ")[2]
        for hook in hooks
        if "--schemafile" in hook["entry"] and re.search(hook["files"], path.relative_to(ROOT).as_posix())
    ]
    named = path.read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
    assert schemas == [path.parent / named]
    schema = json.loads(schemas[0].read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_the_examples_of_the_guide_keep_to_the_schemas(tmp_path: Path) -> None:
    found = dict.fromkeys(KINDS, 0)
    own = {kind: set(checker(kind).schema["properties"]) - {"held_out"} for kind in found}  # which both have
    own["space"] = {"parameters"}  # the others are names that many files have
    for page in sorted((ROOT / "docs" / "guide").rglob("*.md")):
        for body in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            data = yaml.safe_load(body)
            kinds = [kind for kind in found if isinstance(data, dict) and set(data) & own[kind]]
            for kind in kinds:
                checker(kind).validate(data)
                assert read(kind, body, tmp_path), page
                found[kind] += 1
    assert all(found.values())
    assert found["recipe"] >= 2 <= found["policy"]


# Not infinity and what is not a number: JSON knows neither, so no schema can tell them from numbers.
BAD = {
    "recipe": [
        "",
        "- a\n- b\n",
        "just text",
        "extra: 1",
        "dataset: [1]",
        "dataset: {a: 1}",
        "replay: 200",
        "replay: {promts: 3}",
        "replay: {prompts: lots}",
        "replay: {prompts: -3}",
        "replay: {prompts: true}",
        "replay: {max_new_tokens: 1.5}",
        "replay: {loss: mse}",
        *(
            f"replay: {{{key}: {weight}}}"
            for key in ("weight", "opening_weight")
            for weight in ("0", "-1", "true", "much")
        ),
        "replay: {prompts: 5}\nsft: {tuner_type: full}",
        "replay: {prompts: 5}\nsft: {train_type: full}",
        "sft: {tuner_type: full}",
        "replay: {prompts: 5, loss: cross_entropy}\nsft: {train_type: full}",
        "replay: {prompts: 5}\nsft: {init_weights: pissa}",
        "replay: {prompts: 5, loss: kl}\nsft: {loss_type: x}",
        "other_systems: -1",
        "other_systems: often",
        "other_systems: true",
        "sft: [a]",
        "sft: text",
        "sft: {nonsense: 1}",
        "sft: {on: 1}",
        "sft: {lora_rank: true}",
        "sft: {lora_rank: eight}",
        "sft: {lora_rank: 8.5}",
        "sft: {lora_rank: '8.5'}",
        "sft: {lora_rank: [1, 2]}",
        "sft: {learning_rate: '.nan'}",
        "sft: {learning_rate: fast}",
        "sft: {packing: maybe}",
        "sft: {torch_dtype: bf16}",
        "sft: {quant_bits: 5}",
        "sft: {packing: [true]}",
        "sft: {system: [a]}",
        *(f"sft: {{{name}: x}}" for name in recipe.OURS),
    ],
    "space": [
        "",
        "- a",
        "trials: 3",
        "parameters:",
        "parameters: {}",
        "parameters: [lora_rank]",
        *(
            f"parameters: {{lora_rank: {spec}}}"
            for spec in (
                "",
                "8",
                "[4, 8]",
                "{}",
                "{choices: }",
                "{choices: 4}",
                "{choices: []}",
                "{choices: [4, 4]}",
                "{choices: [null]}",
                "{choices: [eight]}",
                "{choices: [8.5]}",
                "{choices: [true]}",
                "{choices: [4, 8], step: 4}",
                "{choices: [4, 8], range: [4, 8]}",
                "{range: 4}",
                "{range: [4]}",
                "{range: [4, 8, 16]}",
                "{range: [4, 4]}",
                "{range: [4, eight]}",
                "{range: [4, 8], log: 1}",
                "{range: [4, 8], log: true, step: 2}",
                "{range: [0, 8], log: true}",
                "{range: [4, 8], step: 0}",
                "{range: [4, 8], step: -1}",
                "{range: [4, 8], step: two}",
                "{range: [4, 8], stride: 2}",
            )
        ),
        "parameters: {learning_rate: {range: [1e-3, 1e-2]}}",  # texts, for YAML
        "parameters: {learning_rate: {range: [-1.0, 1.0], log: true}}",
        "parameters: {lora_rnk: {choices: [4]}}",
        "parameters: {torch_dtype: {choices: [bf16]}}",
        "parameters: {replay: {choices: [-1]}}",
        "parameters: {replay.loss: {choices: [mse]}}",
        "parameters: {replay.weight: {range: [0, 1.0]}}",
        "parameters: {held_out: {range: [0.5, 2.0]}}",
        "parameters: {model: {choices: [a, b]}}",
        *(
            f"{line}\nparameters: {{lora_rank: {{choices: [4]}}}}"
            for line in (
                "extra: 1",
                "trials: 0",
                "trials: 1.5",
                "trials: many",
                "trials: true",
                "minutes: -1",
                "minutes: true",
                "seed: -1",
                "seed: x",
                "prune: true",
                "prune:",
                "prune: [0.5]",
                "prune: {when: 0.5}",
                "prune: {at: 0}",
                "prune: {at: [0.5, 0.5]}",
                "prune: {at: [0.5, 1.5]}",
                "prune: {at: [half]}",
                "prune: {after: 0}",
                "prune: {after: true}",
                "recipe:",
            )
        ),
    ],
    "policy": ["- 1", "text", "leek: 0.1", "leak: 2", "leak: -0.1", "leak: true", "leak: a", "leak:"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in BAD.items() for text in texts])
def test_what_the_code_refuses_for_its_shape_the_schema_refuses(kind: str, text: str, tmp_path: Path) -> None:
    assert not read(kind, text, tmp_path)
    assert not checker(kind).is_valid(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("policy", ""),
        ("policy", "leak: 1\nparity: 0"),
        ("space", "parameters: {lora_rank: {choices: [4, '8']}}"),
        ("space", "recipe: tutorial\nabout: x\ntrials:\nminutes: 0.5\nparameters: {seed: {range: [1, 3], step: }}"),
        ("space", "parameters: {recipe: {choices: [default, tutorial]}}\nprune: false"),
        ("space", "parameters: {target_modules: {choices: [all-linear, [q_proj, v_proj]]}}\nprune: {at: 0.5}"),
        ("space", "parameters: {learning_rate: {choices: [1e-3, 0.01]}, packing: {choices: [true, 'False']}}"),
        ("space", "parameters: {train_type: {choices: [lora]}, replay.loss: {choices: [kl, cross_entropy]}}"),
        ("space", "parameters: {replay.opening_weight: {range: [1, 5.0]}, held_out: {range: [0.5, 1], log: true}}"),
        ("recipe", "{}"),
        ("recipe", "dataset:\nreplay:\nsft:\nabout:\n"),
        ("recipe", "dataset: a b#20"),
        ("recipe", "dataset: [a, b.jsonl]"),
        ("recipe", "sft: {learning_rate: 1e-3, lora_rank: '16', packing: 'True', system: }"),
        ("recipe", "sft: {train_type: lora, target_modules: all-linear, lora_target_modules: [q_proj]}"),
        ("recipe", "sft: {torch_dtype: bfloat16, lora_dtype: , quant_bits: 8, padding_side: left}"),
        ("recipe", "replay: {prompts: 0}\nsft: {tuner_type: adalora, init_weights: pissa}"),
        ("recipe", "replay: {prompts: 5, loss: cross_entropy}\nsft: {tuner_type: lora, loss_type: x}"),
        *(
            ("recipe", f"replay: {{prompts: 5}}\nsft: {{init_weights: {start}}}")
            for start in ("true", "gaussian", "False")
        ),
    ],
)
def test_what_the_code_takes_the_schema_takes(kind: str, text: str, tmp_path: Path) -> None:
    assert read(kind, text, tmp_path)
    checker(kind).validate(yaml.safe_load(text))


VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 8, 0.5, -0.5, 1e-4),
        *("", " ", "8", "-8", "+8", "0.5", "1e-3", ".5", "5.", "1_000", "0x10", "٣"),
        *("true", " TRUE ", "full", "kl", "cross_entropy", "a b"),
        *([], ["a"], ["a", 1], [None], [["a"]], {}, {"a": 1}),
    ]
)
"""Not 8.0, which JSON Schema takes for a whole number."""
SFT = [
    "lora_rank",
    "learning_rate",
    "packing",
    "system",
    "target_modules",
    "tuner_type",
    "train_type",
    "loss_type",
    "quant_bits",
]
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "about": st.just("x"),
        "dataset": st.sampled_from([None, "", "a b", ["a"], ["a", 1], []]),
        "other_systems": VALUES,
        "replay": VALUES
        | st.dictionaries(st.sampled_from(["prompts", "max_new_tokens", "loss", "weight", "x"]), VALUES, max_size=2),
        "sft": VALUES | st.dictionaries(st.sampled_from([*SFT, "x", "model"]), VALUES, max_size=3),
    },
)


@given(RECIPES)
def test_a_recipe_that_the_schema_takes_is_taken_by_the_code(
    tmp_path_factory: pytest.TempPathFactory, made: Any
) -> None:
    if checker("recipe").is_valid(made):
        assert read("recipe", yaml.safe_dump(made), tmp_path_factory.getbasetemp())


def rising(ends: list[Any]) -> bool:
    """Whether the second of two numbers is the greater one, which no schema can tell."""
    return len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or ends[0] < ends[1]


PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.sampled_from(
            [None, 4, [], [4], [4, 8], [4, 4], [True, False], [None], ["kl"], ["x", ["y"]], [0.5]]
        ),
        "range": st.lists(st.sampled_from([0, 1, 4, 8, 2.5, -1, True, "8", None]), max_size=3).filter(rising),
        "log": st.sampled_from([True, False, None, 1]),
        "step": st.sampled_from([None, 0, 0.25, 1, -1, "1", True]),
    },
)
SPACES = st.fixed_dictionaries(
    {
        "parameters": st.dictionaries(
            st.sampled_from(["lora_rank", "learning_rate", "packing", "system", "target_modules", "replay", "x"]),
            VALUES | PARAMETERS,
            max_size=2,
        )
    },
    optional={
        "about": st.just("x"),
        "recipe": st.sampled_from(["default", "tutorial", None, 1]),
        **dict.fromkeys(("trials", "minutes", "seed", "x"), VALUES),
        "prune": VALUES | st.fixed_dictionaries({}, optional={"at": VALUES, "after": VALUES}),
    },
)


@given(SPACES)
def test_a_search_space_that_the_schema_takes_is_taken_by_the_code(
    tmp_path_factory: pytest.TempPathFactory, made: Any
) -> None:
    if checker("space").is_valid(made):
        assert read("space", yaml.safe_dump(made), tmp_path_factory.getbasetemp())


@given(st.dictionaries(st.sampled_from(["leak", "parity", "leek"]), VALUES))
def test_a_policy_is_taken_by_both_or_by_none(tmp_path_factory: pytest.TempPathFactory, made: Any) -> None:
    assert checker("policy").is_valid(made) is read("policy", yaml.safe_dump(made), tmp_path_factory.getbasetemp())
