"""Recipes: what a user may write, and what an error tells."""

from pathlib import Path

import pytest
from pydantic import Field

from schemas.errors import ConfigError
from schemas.recipe import Config, canonical_json, flat_items, load_recipe, parse_recipe, short_hash


class Inner(Config):
    low: float = 0.0
    name: str = "x"


class Outer(Config):
    motion: Inner | None = None
    kinds: tuple[str, ...] = ("video",)
    steps: int = Field(default=1, ge=1)


def test_overrides_reach_nested_and_missing_sections() -> None:
    recipe = parse_recipe(Outer, "steps = 2", "test", ["motion.low=0.002", "motion.name=pan", 'kinds=["image"]'])
    assert recipe == Outer(motion=Inner(low=0.002, name="pan"), kinds=("image",), steps=2)


def test_an_override_wins_over_the_file() -> None:
    assert parse_recipe(Outer, "[motion]\nlow = 0.5", "test", ["motion.low=0.25"]).motion == Inner(low=0.25)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("stepz = 2", [], "'steps'"),
        ("[motion]\nlowest = 1", [], "motion.lowest: unknown key; did you mean 'motion.low'"),
        ("", ["motoin.low=1"], "did you mean 'motion'"),
        ("steps = 0", [], "steps: Input should be greater than or equal to 1 (found 0)"),
        ("steps = ", [], "not valid TOML"),
        ("", ["motion.low"], "not of the form path.to.key=value"),
        ("", ["steps.low=1"], "steps"),
        ("motion.low = nan", [], "finite"),
    ],
)
def test_errors_name_the_key_and_what_is_valid(text: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(Outer, text, "test.toml", overrides)
    assert said in str(caught.value)


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps is a value, not a section"):
        parse_recipe(Outer, "steps = 2", "test", ["steps.low=1"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read"):
        load_recipe(Outer, tmp_path / "missing.toml")


def test_equal_recipes_have_equal_text_and_id() -> None:
    one = parse_recipe(Outer, "steps = 2\n[motion]\nlow = 0.10", "a")
    other = parse_recipe(Outer, "[motion]\nlow = 1e-1", "b", ["steps=2"])
    assert one.canonical_json() == other.canonical_json()
    assert short_hash({"b": 1, "a": [1.0]}) == short_hash({"a": [1.0], "b": 1})
    assert short_hash({"a": 1}) != short_hash({"a": 2})
    assert canonical_json({"ü": None}) == '{"ü":null}'


def test_recipes_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer().steps = 3  # type: ignore[misc]  # what is tested


def test_flat_items() -> None:
    assert dict(flat_items({"a": {"b": 1, "c": {"d": 2}}, "e": 3})) == {"a.b": 1, "a.c.d": 2, "e": 3}
