"""The command line of training: one flag a setting, grouped by section, each parsed once.

The parser returns only the flags that the user typed. The values of the others depend on the preset, the method, or the
run that is resumed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, cast, get_type_hints

import tyro

from rlv2v.cli import SizeFlag
from rlv2v.config import FLAGS, Config
from rlv2v.crop_size import CropSize
from rlv2v.method.baselines import METHODS
from rlv2v.method.rewards import REWARDS
from rlv2v.method.terms import TERMS
from rlv2v.presets import PRESETS

DESCRIPTION = "Train a translator from unpaired videos; docs/method.md says which line of the paper a flag is."


def flags_type() -> Any:
    """Return what tyro parses: a dictionary of the flags that the user typed, with a dictionary for each section."""
    choices: dict[str, Mapping[str, str]] = {
        "preset": dict.fromkeys(PRESETS, ""),
        "method": {name: method.meaning for name, method in METHODS.items()},
        "reward": {name: reward.meaning for name, reward in REWARDS.items()},
    }
    literal, default = cast(Any, Literal), Config()
    owners = {section: type(getattr(default, section)) if section else Config for section, _ in FLAGS.values()}
    fields = {section: hints_and_docstrings(owner) for section, owner in owners.items()}
    groups: dict[str, dict[str, Any]] = {}
    for flag, (section, name) in FLAGS.items():
        hint, text = fields[section][name]
        if name in TERMS:
            text = f"Added term: weight of {TERMS[name].meaning}."
        if flag in choices:
            hint = literal[tuple(choices[flag])]
            text += "".join(f" {key}: {meaning}." for key, meaning in choices[flag].items() if meaning)
        hint = SizeFlag if hint is CropSize else hint
        setting = tyro.conf.arg(
            name=flag.replace("_", "-"), help=text, help_behavior_hint=f"(default: {as_typed(default.get(flag))})"
        )
        groups.setdefault(section, {})[flag] = Annotated[hint, setting]
    sections = {name: typed_dict(name, group) for name, group in groups.items() if name}
    return cast(Any, tyro.conf.OmitArgPrefixes)[typed_dict("Flags", {**groups[""], **sections})]


def hints_and_docstrings(section: type) -> dict[str, tuple[Any, str]]:
    """Return the type of each field of a dataclass, and its docstring on one line, "" for a field that has none."""
    written = next(base for base in section.__mro__ if base.__name__ != "LossConfig")  # which is made, not written
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(written))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            docs[statement.target.id] = " ".join(ast.literal_eval(following.value).split())
    return {name: (hint, docs.get(name, "")) for name, hint in get_type_hints(section).items()}


def typed_dict(name: str, fields: Mapping[str, Any]) -> Any:
    """Return a TypedDict none of whose keys is required."""
    return TypedDict(name, dict(fields), total=False)  # type: ignore[operator]


def as_typed(value: Any) -> str:
    """Return a setting as one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def resolve(flags: Mapping[str, Any]) -> Config:
    """Return the config that the typed flags mean, on top of the preset and method or of the earlier run that is named.

    Raises:
        UserError: no such preset or method, or a run that this version cannot read.
    """
    typed: dict[str, Any] = {}
    for name, value in flags.items():
        typed |= value if isinstance(value, Mapping) else {name: value}
    saved = typed.get("out", Config.out) / "config.json"
    if typed.get("resume") and saved.is_file():
        start = Config.read(saved)
    elif typed.get("from") and not {"preset", "method"} & typed.keys():
        start = Config.read(typed["from"] / "config.json").replace(out=Config.out, resume=False, replicas=0)
    else:
        start = Config.of(typed.get("preset", "default"), typed.get("method", "rlv2v"))
    for flag, other in (("budget", "steps"), ("steps", "budget")):
        if typed.get(flag) is not None:
            start = start.replace(**{other: None})
    return start.replace(**typed)
