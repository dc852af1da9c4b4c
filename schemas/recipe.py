"""Recipes: TOML text in, one frozen, validated model out. Unknown keys are errors that name the nearest valid one.

A recipe is data because recipes are stored, hashed and compared; what code would give (types, one place, completeness)
comes from the models that validate it. Those live beside what they configure and derive from `Config`.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every option model: frozen, and closed to keys nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def canonical_json(self) -> str:
        """The resolved options as one canonical line of JSON: equal options, equal text."""
        return canonical_json(self.model_dump(mode="json"))


def later_option(default: object, **limits: Any) -> Any:
    """The field of an option that came after ids were given: while it says nothing new it is left out, so that recipes
    without it keep the ids they had. `limits` are Field's.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **limits)


def canonical_json(value: object) -> str:
    """Any JSON-able value -> one line with sorted keys and no spaces, so that equal values have equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def short_hash(value: object) -> str:
    """Any JSON-able value -> 16 hex digits of the SHA-256 of its canonical JSON: the form of every derived id."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def load_recipe(model: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """A TOML file and `path.to.key=value` overrides -> the validated recipe.

    Raises: ConfigError if the file is missing, is not TOML, or does not validate.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    return parse_recipe(model, text, source=str(path), overrides=overrides)


def parse_recipe(model: type[C], text: str, source: str, overrides: Sequence[str] = ()) -> C:
    """TOML text and overrides -> the validated recipe. `source` names the text in errors."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {source} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    return validated(model, values, f"recipe {source}")


def validated(model: type[C], values: Mapping[str, Any], source: str) -> C:
    """Raw values -> options. `source` names them in errors. Raises: ConfigError if they do not validate."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source} is wrong:\n" + "\n".join(_explain(error, model))) from error


def overridden(config: C, overrides: Sequence[str], source: str) -> C:
    """Options and `path.to.key=value` overrides -> validated options. `source` names them in errors.

    Raises: ConfigError if an override is malformed or does not validate.
    """
    values = config.model_dump()
    for override in overrides:
        _apply_override(values, override)
    return validated(type(config), values, source)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form path.to.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: `--set decoder=opencv` needs no quotes
    node = values
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override!r}: {part} is a value, not a section")
        node = child
    node[parts[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = sorted(_valid_keys(model))
            near = difflib.get_close_matches(where, valid, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            yield f"  {where}: unknown key; {hint}"
        else:
            yield f"  {where}: {problem['msg']} (found {problem['input']!r})"


def _valid_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for nested in _nested_models(field.annotation):
            yield from _valid_keys(nested, f"{prefix}{name}.")


def _nested_models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for argument in getattr(annotation, "__args__", ()):
            yield from _nested_models(argument)


def flat_items(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested options -> (dotted path, value) pairs, for tables and differences shown to people."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
