"""A run as text: YAML in, dotted overrides, types and names checked; YAML out."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pydantic
import yaml

from megatron_mm.config.checks import check_consistency
from megatron_mm.config.schema import RunConfig
from megatron_mm.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML safe load that reads 1e-4 as a float (PyYAML follows YAML 1.1, where it is a string)
    and refuses a key written twice (PyYAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise UserError("key written twice", where=f"line {key.start_mark.line + 1}", found=key.value)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), check, and return the run."""
    config = read_config(path, overrides)
    check_consistency(config)
    return config


def read_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The same with types and names checked, and not yet what must hold between fields."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError("cannot read the config", where=str(path), found=error.strerror, do="check --config") from None
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError("not valid YAML", where=str(path), found=str(error)) from None
    if not isinstance(data, dict):
        raise UserError("a config is a mapping of fields", where=str(path), found=type(data).__name__)
    for override in overrides or []:
        _apply_override(data, override)
    return _typed(data)


def _apply_override(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals:
        raise UserError("an override is written a.b=value", where="command line", found=override)
    *parents, last = name.split(".")
    node: Any = data
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 (a SafeLoader)
        if isinstance(node, list):
            node[int(last)] = parsed
        else:
            node[last] = parsed
    except (TypeError, ValueError, IndexError, AttributeError):
        raise UserError("the override does not lead to a field", where=name, found=override) from None


def config_from_dict(data: dict[str, Any]) -> RunConfig:
    """Validate types and names, then consistency."""
    config = _typed(data)
    check_consistency(config)
    return config


def _typed(data: dict[str, Any]) -> RunConfig:
    adapter = pydantic.TypeAdapter(RunConfig)
    try:
        # JSON mode: strict about types, yet lists may fill tuples and whole numbers may fill floats.
        return adapter.validate_json(json.dumps(data), strict=True, extra="forbid")
    except TypeError as error:
        raise UserError("a value is of a type that a config cannot hold", found=str(error)) from None
    except pydantic.ValidationError as error:
        raise _explain(error) from None


def _fields_at(location: tuple[Any, ...]) -> str:
    node: Any = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        node = next((f.type for f in dataclasses.fields(node) if f.name == part), None)
        candidates = [node, *getattr(node, "__args__", ())]
        node = next((c for c in candidates if dataclasses.is_dataclass(c)), None)
        if node is None:
            return ""
    return ", ".join(f.name for f in dataclasses.fields(node))


def _explain(error: pydantic.ValidationError) -> UserError:
    """All faults in one message, each with its field."""
    faults = error.errors(include_url=False)
    first = faults[0]
    where = ".".join(str(p) for p in first["loc"])
    more = "".join(f"\n  also:    {'.'.join(str(p) for p in f['loc'])}: {f['msg']}" for f in faults[1:])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return UserError(
            "unknown field", where=where, found=repr(first["input"]) + more, allowed=_fields_at(first["loc"][:-1])
        )
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return UserError("a required field is missing" + more, where=where, do="add it to the config")
    return UserError("wrong value", where=where, found=repr(first["input"]) + more, allowed=first["msg"])


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain data that `config_from_dict` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)
