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
from train.gpus import GIB

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


def test_an_adapter_fits_on_one_h100() -> None:
    recipe = load_training_recipe("instruct_lora")
    plan = plan_training(recipe, "h100", None, None)
    assert plan.load.num_workers == 1
    plan.check()
    assert plan.memory.peak < 40 * GIB  # half of it, as the recipe says
    whole = load_training_recipe(
        "instruct_2", ["pretrain.execution.num_workers=1", "pretrain.execution.layout.shard=1"]
    )
    with pytest.raises(ConfigError, match="weights, gradients, moments"):
        plan_training(whole, "h100", None, None).check()


def test_preferences_are_planned_with_an_adapter() -> None:
    plans = [
        plan_training(load_training_recipe("dpo", more), "h100", None, None) for more in ((), ["dpo.adapter.rank=8"])
    ]
    assert plans[1].memory.peak < plans[0].memory.peak
    assert "frozen weights" in {row.name for row in plans[1].memory.rows}


@pytest.mark.parametrize("name", [*PUBLISHED, "instruct_lora"])
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


def test_the_fewest_workers_are_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of eight may go on as one: each worker then has twice the rows."""
    sets = [f"pretrain.execution.{one}" for one in ("num_workers=16", "min_workers=8")]
    plan = plan_training(load_training_recipe("pretrain_1", sets), "h100", None, None)
    assert plan.fewest is not None
    assert (plan.fewest.num_workers, plan.fewest.parts) == (8, 2 * plan.load.parts)
    plan.check()
    print_plan(plan, json=False)
    assert re.search(r"^8 workers alone +\d+\.\d\d GiB  32 times a step$", capsys.readouterr().out, re.MULTILINE)
    print_plan(plan, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["fewest"] == {"num_workers": 8, "peak_bytes": found["peak_bytes"]}  # two rows at once in both
    assert found["fits"]
    at_once = [
        "pretrain.batch_size=32",
        "pretrain.execution.rows_at_once=4",
    ]  # two of sixteen workers', four of eight's
    plan = plan_training(load_training_recipe("pretrain_1", [*sets, *at_once]), "h100", None, None)
    assert plan.memory.peak < 79.6 * GIB
    with pytest.raises(ConfigError, match=r"set execution\.rows_at_once to 1"):
        plan.check()
    print_plan(plan, json=True)
    assert not json.loads(capsys.readouterr().out)["fits"]


def test_copies_are_planned() -> None:
    """Of 8,492,011,520 parameters: a reference beside them in float32, and what samples are drawn with in bfloat16."""
    dpo = [
        f"dpo.{one}"
        for one in ("execution.num_workers=1", "execution.layout.shard=1", "execution.layout.compute=float32")
    ]
    stored, copied = (
        plan_training(load_training_recipe("dpo", [*dpo, f"dpo.reference={kind}"]), "h100", None, None)
        for kind in ("stored", "copy")
    )
    assert copied.memory.peak - stored.memory.peak == 4 * 8_492_011_520
    with pytest.raises(ConfigError, match="set reference to 'stored'") as refused:
        copied.check()
    assert not re.search("num_workers|shard|bfloat16", str(refused.value))

    spread = [f"pretrain.execution.{one}" for one in ("num_workers=2", "layout.shard=2", "rows_at_once=1")]
    spread.append("pretrain.execution.layout.recompute=full")
    drawing = 'pretrain.execution.samples.prompts=["a"]'
    plain, drawn = (
        plan_training(load_training_recipe("pretrain_1", [*spread, *more]), "h100", None, None)
        for more in ((), (drawing,))
    )
    plain.check()
    assert drawn.memory.at("samples") - plain.memory.at("samples") == 2 * 8_492_011_520
    with pytest.raises(ConfigError, match=r"leave out execution\.samples"):
        drawn.check()


def test_preferences_are_not_told_to_share_pairs() -> None:
    plan = plan_training(load_training_recipe("dpo", ["dpo.execution.layout.recompute=nothing"]), "h100", None, None)
    with pytest.raises(ConfigError, match="expected at most") as refused:
        plan.check()
    assert "layout.recompute to 'full'" in str(refused.value)
    assert "layout.context" not in str(refused.value)


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


@pytest.mark.parametrize("name", ["pretrain_1", "pretrain_2", "instruct_lora"])
def test_the_page_shows_what_the_command_prints(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (CHECKOUT / "docs" / "training.md").read_text(encoding="utf-8")
    [shown] = re.findall(rf"^\$ outback plan {name}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    print_plan(plan_training(load_training_recipe(name), "h100", None, None), json=False)
    assert capsys.readouterr().out == shown
