"""JSON schema of a Python function, for chat templates that offer tools to the model.

    def weather(city: str, days: int = 1) -> str:
        '''Tells the weather.

        Args:
            city: Where.
            days: How many days ahead. (choices: [1, 2, 3])
        '''

The types come from the signature, the descriptions from the docstring in Google's format. The schema is the
same as that of transformers' `get_json_schema`, with which models were trained.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .vocabulary import TokenizerError

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of `function`; TokenizerError if a type or a description is missing."""
    name = getattr(function, "__name__", "operation")
    text = inspect.getdoc(function)
    if not text:
        raise TokenizerError(f"the tool {name} has no docstring to describe it")
    sections = _sections(text)
    described = _arguments(sections["args"])
    try:
        hints = get_type_hints(function)
    except NameError as problem:
        raise TokenizerError(f"the tool {name}: a type is not defined: {problem}") from problem

    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    required: list[str] = []
    for index, (argument, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if argument not in hints:
            if index == 0 and argument in ("self", "cls"):
                continue
            raise TokenizerError(f"the tool {name}: the argument {argument} has no type")
        if argument not in described:
            raise TokenizerError(f"the tool {name}: its docstring does not describe the argument {argument}")
        schema = _schema(hints[argument], f"the tool {name}: the argument {argument}")
        description = described[argument]
        choices = re.search(r"\(choices:\s*(.*?)\)\s*$", description, flags=re.IGNORECASE)
        if choices:
            try:
                schema["enum"] = json.loads(choices[1])
            except ValueError as problem:
                raise TokenizerError(f"the tool {name}: the choices of {argument}: {problem}") from problem
            description = description[: choices.start()].strip()
        parameters["properties"][argument] = {**schema, "description": description}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    if required:
        parameters["required"] = required

    tool: dict[str, Any] = {"name": name, "description": sections["description"], "parameters": parameters}
    if "return" in hints:
        tool["return"] = _schema(hints["return"], f"the tool {name}: what it returns")
        if sections["returns"]:
            tool["return"]["description"] = sections["returns"]
    return {"type": "function", "function": tool}


def _sections(text: str) -> dict[str, str]:
    found = {"description": "", "args": "", "returns": "", "raises": ""}
    current = "description"
    for line in text.splitlines():
        heading = line.strip().removesuffix(":").lower()
        if line.strip().endswith(":") and heading in ("args", "returns", "raises"):
            current = heading
        else:
            found[current] += line + "\n"
    return {name: inspect.cleandoc(section).strip() for name, section in found.items()}


def _arguments(section: str) -> dict[str, str]:
    """Parse lines `name: description`; a description may take several lines."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r"\s*(\w+):\s*(.*)", line)
        if start:
            name = start[1]
            found[name] = start[2].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _schema(hint: Any, what: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is None:
        if hint is Any:
            return {}
        return {"type": _TYPES.get(hint, "object")}
    if origin in (Union, types.UnionType):
        options = [_schema(option, what) for option in inner if option is not type(None)]
        if len(options) == 1:
            schema = options[0]
        elif all(isinstance(option.get("type"), str) for option in options):
            schema = {"type": sorted(option["type"] for option in options)}
        else:
            schema = {"anyOf": options}
        return {**schema, "nullable": True} if type(None) in inner else schema
    if origin is Literal:
        kinds = list(dict.fromkeys(_TYPES.get(type(value)) for value in inner))
        if None in kinds:
            raise TokenizerError(f"{what}: Literal of other values than numbers, strings, booleans and None")
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if origin is list:
        return {"type": "array", "items": _schema(inner[0], what)}
    if origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_schema(option, what) for option in inner]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(inner[1], what)}
    raise TokenizerError(f"{what} has the type {hint}, for which there is no JSON schema")
