"""What the processor has, and what a run makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from namesake import process, recipe, run
from namesake.terminal import Screen
from namesake_serving import engine, settings

AVX512 = "flags\t\t: fpu avx2 avx512f avx512dq avx512bw avx512vl\n"
AVX2 = "flags\t\t: fpu avx avx2 fma\n"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (f"processor\t: 0\n{AVX512}", True),
        (f"processor\t: 0\n{AVX512}processor\t: 1\n{AVX512}", True),
        (f"processor\t: 0\n{AVX2}", False),
        ("flags : avx512f avx512dq\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("model name : something else\n", True),
        ("", True),
    ],
)
def test_what_bfloat16_is_multiplied_by_is_read_off_the_processor(
    text: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "CPU", tmp_path / "cpuinfo")
    assert process.multiplies_bf16(), "where nobody says"
    (tmp_path / "cpuinfo").write_text(text)
    assert process.multiplies_bf16() is has


@pytest.mark.skipif(not process.CPU.exists(), reason="no /proc here")
def test_torch_says_the_same_of_this_machine() -> None:
    torch = pytest.importorskip("torch")
    assert process.multiplies_bf16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture(params=[True, False], ids=["AVX-512", "AVX2"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the processor is quick at bfloat16."""
    has = bool(request.param)
    for module in (run, engine):
        monkeypatch.setattr(module, "multiplies_bf16", lambda: has)
    monkeypatch.setattr(run, "_has_gpu", lambda: False)
    return has


def fitted(args: str = "", **overrides: str) -> tuple[recipe.Recipe, str]:
    """The default recipe as it is trained, and what was said of that."""
    told: list[str] = []
    screen = Screen()
    screen.warn = lambda text: told.append(str(text))  # type: ignore[method-assign]
    request = run.Request("踩踩背 CCB", "老爷爷 OldGrandpa", overrides=overrides, args=args)
    plan = recipe.load("default", overrides=overrides, args=args)
    return run._fitting(plan, request, screen), "".join(told)


def test_a_recipe_is_trained_in_what_the_processor_is_quick_at(fast: bool) -> None:
    plan, told = fitted()
    dtype = "bfloat16" if fast else "float32"
    assert (plan.sft["torch_dtype"], plan.sft["lora_dtype"]) == (dtype, dtype)
    assert ("AVX-512" in told) is not fast


@pytest.mark.parametrize("given", ["args", "override"])
def test_what_was_asked_for_on_the_command_line_stays(fast: bool, given: str) -> None:
    asked = {"torch_dtype": "bfloat16", "lora_dtype": "bfloat16"}
    words = " ".join(f"--{key} {value}" for key, value in asked.items())
    plan, told = fitted(words) if given == "args" else fitted(**asked)
    assert (plan.sft["torch_dtype"], plan.sft["lora_dtype"], told) == ("bfloat16", "bfloat16", "")


def test_a_gpu_trains_in_what_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(run, "_has_gpu", lambda: True)
    assert fitted()[0].sft["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("gpu", [True, False])
def test_an_engine_answers_in_what_the_processor_is_quick_at_unless_told(fast: bool, gpu: bool) -> None:
    words = engine.command(Path("weights"), Path("socket"), settings.read(), gpu=gpu)
    assert ("--dtype" in words) is (not fast and not gpu)
    told = settings.read(engine_args=("--dtype=bfloat16",))
    assert engine.command(Path("weights"), Path("socket"), told, gpu=gpu)[-1] == "--dtype=bfloat16"  # the last one wins


@pytest.mark.parametrize(
    ("device", "found"),
    [("nvidia3", True), ("nvidia0", True), ("nvidiactl", False), ("dxg", False), ("null", False)],
)
def test_a_gpu_is_found_under_whatever_number_the_container_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, found: bool
) -> None:
    (tmp_path / device).touch()
    monkeypatch.setattr(process, "DEVICES", tmp_path)
    monkeypatch.setattr(process, "WSL", tmp_path / "libcuda.so.1")
    assert process.has_gpu() is found
    (tmp_path / "libcuda.so.1").touch()
    assert process.has_gpu()
