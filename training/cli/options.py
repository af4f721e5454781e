"""Options of the command line from a settings class, by tyro, with a sentence in place of its boxes of errors."""

import contextlib
import dataclasses
import difflib
import functools
import io
import operator
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ValidationError
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

NONE = "none"
REGISTRY = ConstructorRegistry()


def parse_options(kind: type[BaseModel], arguments: Sequence[str], program: str, what: str, settings: Any) -> Any:
    """Settings from options, over those of a file (None without one); ``--help`` prints and exits.

    Raises:
        ValueError: an option is unknown, missing, or has a value that it cannot have.
    """
    markers: list[Any] = [tyro.conf.EnumChoicesFromValues, tyro.conf.CascadeSubcommandArgs]
    options: dict[str, Any] = {}
    if settings is not None:
        markers.append(tyro.conf.AvoidSubcommands)  # the file has chosen
        options["default"] = settings
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            values: Any = tyro.cli(
                kind,
                prog=program,
                description=what,
                args=list(arguments),
                config=tuple(markers),
                registry=REGISTRY,
                **options,
            )
        return at_home(kind(**values))
    except ValidationError as error:
        raise ValueError(why_invalid(kind, error)) from None
    except SystemExit as error:
        if not error.code:
            raise
        raise ValueError(f"{_unboxed(told.getvalue())}; see `{program} --help`.") from None


def at_home(value: Any) -> Any:
    """Settings whose paths that begin with ``~`` begin with the home folder, as no shell has made them in a file."""
    if isinstance(value, BaseModel):
        return value.model_copy(update={name: at_home(getattr(value, name)) for name in type(value).model_fields})
    if isinstance(value, dict):
        return {key: at_home(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(at_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _unboxed(box: str) -> str:
    """The sentence of a box that tyro drew, by the terminal with lines or blanks, without what it explains below."""
    lines = [line[1:-1].rstrip() for line in box.splitlines()]
    starts_with_rule = len(lines) > 1 and not lines[1].strip(" ─-")  # below the title, where the box has no frame
    sentence = []
    for line in lines[2 if starts_with_rule else 1 :]:
        if not line.strip(" ─-"):
            break
        if not line.startswith(" " * 8):  # an option's help
            sentence.append(re.sub(r"\s*\(applied to [^)]*\)?", "", line).strip())
    return " ".join(sentence).rstrip(".")


def why_invalid(kind: type[BaseModel], error: ValidationError) -> str:
    """The first of pydantic's findings as a sentence, a mistyped name before what is missing for it."""
    found = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    names, owners, siblings = [], {"": kind}, []
    for part in first["loc"]:
        if part in owners:  # the kind of a source, which pydantic names between the fields
            owners = {"": owners[part]}
            continue
        names.append(str(part))
        siblings = [name for owner in owners.values() for name in owner.model_fields]
        field = next((owner.model_fields[part] for owner in owners.values() if part in owner.model_fields), None)
        owners = {_kind_of(model): model for model in _models(field.annotation)} if field is not None else {}
    name = ".".join(names)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(names[-1], siblings, 1)
        meant = f"perhaps {close[0]} is meant" if close else f"there are {', '.join(siblings)}"
        return f"{name} is no setting; {meant}{more}."
    why = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{name} is missing{more}."
    if not names:  # of several settings together
        return f"{why}{more}."
    return f"{name} = {first['input']!r}: {why[0].lower()}{why[1:]}{more}."


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Settings classes in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def _kind_of(model: type[BaseModel]) -> str:
    return model.model_fields["kind"].default if "kind" in model.model_fields else ""


@REGISTRY.struct_rule
def _settings_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A settings class as a mapping that is checked as a whole later, so that errors name the whole place."""
    if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
        return None
    types_of = typing.get_type_hints(info.type, include_extras=True)

    def make(**values: Any) -> dict[str, Any]:
        return values

    make.__doc__ = info.type.__doc__  # the heading of its options
    return StructConstructorSpec(make, tuple(_option(info, name, types_of[name]) for name in info.type.model_fields))


def _option(info: StructTypeInfo, name: str, annotation: Any) -> StructFieldSpec:
    field = info.type.model_fields[name]
    default = MISSING_NONPROP if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(info.default, info.type):
        default = getattr(info.default, name)
    if typing.get_origin(field.annotation) is Literal and len(typing.get_args(field.annotation)) == 1:
        annotation = Annotated[annotation, tyro.conf.Suppress]  # the kind of a source, chosen by its name
    elif len(models := list(_models(field.annotation))) > 1:  # a source, chosen by its kind
        named = (Annotated[model, tyro.conf.subcommand(_kind_of(model), prefix_name=False)] for model in models)
        annotation = functools.reduce(operator.or_, named)
    elif default in ([], {}, ()):
        annotation = Annotated[annotation, tyro.conf.arg(help_behavior_hint="(default: none)")]
    return StructFieldSpec(name, annotation, default, " ".join((field.description or "").split()))


@REGISTRY.primitive_rule
def _optional_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """``PATH`` where tyro says ``{None}|PATH``; "none" unsets what a file has set."""
    kinds = typing.get_args(info.type) if info.type_origin in (typing.Union, types.UnionType) else ()
    inner = [kind for kind in kinds if kind is not type(None)]
    if len(inner) != 1 or len(kinds) != 2:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        instance_from_str=lambda words: None if words == [NONE] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [NONE] if value is None else spec.str_from_instance(value),
        choices=spec.choices and (*spec.choices, NONE),
    )


@REGISTRY.primitive_rule
def _mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """``NAME=VALUE ...`` for a mapping, ``ROW:TASK=FILE ...`` for the rows of a table; pydantic checks the rest."""
    if info.type_origin is not dict:
        return None
    nested = typing.get_origin(typing.get_args(info.type)[1]) is dict

    def read(words: list[str]) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for word in words:
            name, equals, value = word.partition("=")
            row, colon, task = name.rpartition(":")
            if not equals or (nested and not colon):
                raise ValueError(f"{word!r} is not {metavar}")
            if nested:
                read.setdefault(row, {})[task] = value
            else:
                read[name] = value
        return read

    def show(value: dict[Any, Any]) -> list[str]:
        if nested:
            return [f"{row}:{task}={path}" for row, tasks in value.items() for task, path in tasks.items()]
        return [f"{getattr(name, 'value', name)}={item}" for name, item in value.items()]

    metavar = "ROW:TASK=FILE" if nested else "NAME=VALUE"
    return PrimitiveConstructorSpec("*", f"[{metavar} ...]", read, lambda value: isinstance(value, dict), show)
