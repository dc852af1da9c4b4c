import json
import re
import sys
import tomllib

import pytest

from jobs import cli
from jobs.plan import plan_training, print_plan
from jobs.shipped import FOLDER
from jobs.train import TrainRecipe, load_training_recipe
from schemas.errors import ConfigError
from tests.conftest import CHECKOUT

PUBLISHED = ("pretrain_1", "pretrain_2", "quality", "instruct_1", "instruct_2")


def for_64(name: str) -> list[str]:
    """What the recipe's comment says to set on 64 GPUs."""
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    [line] = re.findall(r"^# 64 H100s.*$", text, re.MULTILINE)
    return re.findall(r"--set (\S+)", line)


@pytest.mark.parametrize("name", [*PUBLISHED, "dpo"])
@pytest.mark.parametrize("num_gpus", [8, 64])
def test_published_recipes_fit_on_h100s(name: str, num_gpus: int) -> None:
    recipe = load_training_recipe(name, for_64(name) if num_gpus == 64 else ())
    plan = plan_training(recipe, "h100", None, None)
    assert plan.load.num_workers == num_gpus
    plan.check()


@pytest.mark.parametrize("name", [*PUBLISHED, "dpo"])
def test_more_gpus_are_the_same_training(name: str) -> None:
    recipes = [load_training_recipe(name), load_training_recipe(name, for_64(name))]
    configs = [config for recipe in recipes if (config := recipe.pretrain or recipe.dpo)]
    options = [config.model_dump(exclude={"execution"}) for config in configs]
    assert options[0] == options[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_of_a_recipe_are_as_long_as_it_packs_them(name: str) -> None:
    """The command that makes its data says the context that its model is planned for."""
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    said = re.findall(r"--set context_len=(\d+)", text)
    packed = int(said[0]) if said else tomllib.loads((FOLDER / "pack.toml").read_text())["context_len"]
    assert plan_training(load_training_recipe(name), "h100", None, None).load.row_len == packed


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["outback", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_table_comes_before_the_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "pretrain_1", "--set", "pretrain.execution.rows_at_once=4") == 2
    told = capsys.readouterr()
    assert "activations of 32 layers" in told.out
    assert "tokens/s/GPU" in told.out
    assert "set execution.rows_at_once to 1" in told.err


def test_json_says_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "pretrain_2", "--json", "--gpu", "h200") == 0
    found = json.loads(capsys.readouterr().out)
    at_worst = [row["num_bytes"] for row in found["rows"] if found["worst"] in row["moments"]]
    assert sum(at_worst) == pytest.approx(found["peak_bytes"])
    assert found["fits"]
    assert found["step"]["tokens"] == 16 * 131_072


def test_a_cpu_has_no_limit_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_training(load_training_recipe("pretrain_1", ["pretrain.execution.rows_at_once=64"]), "cpu", None, None)
    plan.check()
    print_plan(plan, json=False)
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain_1", "--context-len", "9216"], "found the context 9216, expected 1 to 5120"),
        (["pretrain_1", "--document-len", "0"], "found documents of 0 tokens"),
        (["pretrain_1", "--gpu", "k80"], "found the GPU 'k80'"),
        (["captioner"], "only language models are planned"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert call(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def test_a_shorter_context_needs_less() -> None:
    recipe: TrainRecipe = load_training_recipe("pretrain_2")
    long, short = (plan_training(recipe, "h100", length, None) for length in (None, 32_768))
    assert short.load.row_len == 32_768
    assert short.memory.peak < long.memory.peak
    with pytest.raises(ConfigError, match="expected 1 to 131072, what the model can see"):
        plan_training(recipe, "h100", 262_144, None)


@pytest.mark.parametrize("name", ["pretrain_1", "pretrain_2"])
def test_the_page_shows_what_the_command_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (CHECKOUT / "docs" / "training.md").read_text(encoding="utf-8")
    [shown] = re.findall(rf"^\$ outback plan {name}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    print_plan(plan_training(load_training_recipe(name), "h100", None, None), json=False)
    assert capsys.readouterr().out == shown
