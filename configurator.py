"""Configuration: a typed dataclass < config file(s) < --key=value.

    cfg = load(TrainConfig, ["config/smoke.py", "--seed=7", "--compile"])

A config file is plain Python that assigns some of the dataclass's fields; it runs in a namespace of its own. A key that
is not a field, in a file or on the command line, is an error that names the nearest keys. A bare flag means True.
"""

import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import types
import typing


class UserError(ValueError):
    """Something the user can mend. The text says what is wrong, with the value, and what to do; no traceback is shown."""


def run(main) -> None:
    """Call main(argv) as a program: a UserError becomes one message and exit code 2, a returned int the exit code."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def load(Config, argv: list[str], quiet: bool = True):
    """Config instance from defaults, then the files in argv, then its --key=value flags; every fault is listed at once.

    Raises UserError for unknown keys, values of the wrong type and what Config.__post_init__ refuses.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(Config))
        sys.exit(0)
    types_of = field_types(Config)
    values, origin, faults = {}, {}, []
    settings = [s for arg in argv if not arg.startswith("--") for s in read_file(arg)]
    settings += [read_flag(arg) for arg in argv if arg.startswith("--")]
    for key, value, where in settings:
        if key not in types_of:
            faults.append(f"{where}: unknown key {key!r}{nearest(key, types_of)}")
            continue
        try:
            from_text = where == "command line" and isinstance(value, str)
            values[key] = parse(value, types_of[key]) if from_text else check(value, types_of[key])
            origin[key] = where
        except (ValueError, OverflowError):
            faults.append(f"{where}: {key}={value!r} is not of type {type_name(types_of[key])}")
    if faults:
        raise UserError(
            "\n  ".join(["the configuration has faults:", *faults, "--help lists every key"])
        )
    try:
        cfg = Config(**values)
    except UserError as error:
        given = ", ".join(f"{key}={values[key]!r} ({origin[key]})" for key in values)
        raise UserError(f"{error}\n  settings given: {given or 'none'}") from None
    if not quiet:
        print_differences(cfg, origin)
    return cfg


def read_file(path: str) -> list[tuple[str, object, str]]:
    """(key, value, path) for every public name that the config file assigns; imported modules are no settings."""
    if not os.path.isfile(path):
        hint = " (a flag begins with --)" if "=" in path else ""
        raise UserError(f"config file {path!r} does not exist{hint}")
    namespace = {"__file__": path}
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), namespace)
    except Exception as error:  # whatever is wrong in somebody's config file is theirs to mend
        raise UserError(
            f"config file {path} does not run: {type(error).__name__}: {error}"
        ) from None
    return [
        (key, value, path)
        for key, value in namespace.items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType)
    ]


def read_flag(arg: str) -> tuple[str, object, str]:
    key, equals, text = arg[2:].partition("=")  # on the first "=" only: the value may hold others
    return key.replace("-", "_"), text if equals else True, "command line"


def field_types(Config) -> dict[str, type]:
    hints = typing.get_type_hints(Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(Config)}


def options(kind) -> tuple:
    """The alternatives of a type: int | None -> (int, NoneType)."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def parse(text: str, kind):
    """The value that text on a command line stands for. Raises ValueError where it is none of the type."""
    if type(None) in options(kind) and text in ("None", "none", ""):
        return None
    if str in options(kind):
        return text
    if bool in options(kind):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    for option in options(kind):
        if typing.get_origin(option) is tuple:
            items = filter(None, (item.strip(" '\"") for item in text.strip("()[] ").split(",")))
            return tuple(parse(item, typing.get_args(option)[0]) for item in items)
        if option in (int, float):
            return check(option(text), kind)
    raise ValueError(text)


def check(value, kind):
    """value as the type wants it (an int becomes a float, a list a tuple); ValueError where it does not fit."""
    for option in options(kind):
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError(value)
            return float(value)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            return tuple(check(item, typing.get_args(option)[0]) for item in value)
        if (
            isinstance(option, type)
            and isinstance(value, option)
            and (option is bool or not isinstance(value, bool))
        ):
            return value
    raise ValueError(value)


def nearest(key: str, known) -> str:
    names = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def type_name(kind) -> str:
    return " | ".join(
        "None"
        if o is type(None)
        else getattr(o, "__name__", str(o))
        if typing.get_origin(o) is None
        else str(o)
        for o in options(kind)
    )


def comments(Config) -> dict[str, str]:
    """The comment on the line of each field, read from the source of the dataclass and its bases."""
    found = {}
    for cls in reversed(Config.__mro__):
        if dataclasses.is_dataclass(cls):
            found.update(re.findall(r"^\s+(\w+): [^#\n]*?#\s*(.*)$", inspect.getsource(cls), re.M))
    return found


def help_text(Config) -> str:
    """One line per key: name, type, default, comment."""
    kinds, notes = field_types(Config), comments(Config)
    lines = [
        f"  --{field.name}={field.default!r}".ljust(34)
        + f" {type_name(kinds[field.name]):<14} {notes.get(field.name, '')}"
        for field in dataclasses.fields(Config)
    ]
    module = inspect.getmodule(Config).__doc__ or ""
    return "\n".join(
        [
            module.strip(),
            "",
            "keys (--key=value, or assigned in a config file; a bare --key means True):",
            *lines,
        ]
    )


def print_differences(cfg, origin: dict[str, str]) -> None:
    """What differs from the defaults and where it came from."""
    print(f"{type(cfg).__name__}: defaults, but")
    for field in dataclasses.fields(cfg):
        if getattr(cfg, field.name) != field.default:
            print(
                f"  {field.name} = {getattr(cfg, field.name)!r}  ({origin.get(field.name, 'derived')})"
            )


def save(cfg, path: str) -> None:
    """The resolved configuration as JSON."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(dataclasses.asdict(cfg), f, indent=1)
        f.write("\n")
