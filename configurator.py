"""Configuration: dataclasses < config file(s) < --key=value.

    model, loop = load(["config/smoke.py", "--seed=7", "--compile"], ModelConfig, LoopConfig)

The fields of the dataclasses are the keys, one flat set. A config file is Python that assigns some
of them, or a run's config.json, without its force. An unknown key is refused with the nearest ones.
"""

import ast
import difflib
import inspect
import json
import keyword
import os
import re
import sys
import types
import typing
from dataclasses import fields

COMMENT = r"^\s+(\w+): [^#\n]*?#\s*(.*)$"  # behind a field of a dataclass
PATHS = ("out_dir", "data_dir", "local_dir", "checkpoint", "init_from", "out", "dest")  # not ""
ADVICE = "write --key=value (a number is 0, or 1e-30 to 9e18 in size), and see --help"
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UserError(ValueError):
    """This error is something the user can mend; its text is shown without a traceback."""


def require(cfg: object, ranges: dict[str, str], choices: dict[str, tuple] | None = None) -> None:
    """Raise one UserError that names every key of cfg with a value out of bounds.

    ranges: interval -> keys, as {"[1, inf)": "max_steps keep", "[0, 1)": "momentum"}. choices:
    key -> allowed values. None passes; of a tuple every item has the bounds.
    """
    faults = []
    for interval, keys in ranges.items():
        low, high = (float(end) for end in interval[1:-1].split(","))
        excluded = [low] * interval.startswith("(") + [high] * interval.endswith(")")
        words = f"in {interval}"
        if interval.endswith("inf)"):
            words = f"at least {low:g}" if interval.startswith("[") else f"above {low:g}"
        for key in keys.split():
            value = getattr(cfg, key)
            items = value if isinstance(value, tuple) else (value,) if value is not None else ()
            bad = [x for x in items if x in excluded or not low <= x <= high]
            faults += [f"{key} must be {words}, got {x}" for x in bad]
    for key, known in (choices or {}).items():
        if getattr(cfg, key) not in known:
            faults.append(f"{key} must be one of {', '.join(known)}, got {getattr(cfg, key)!r}")
    if faults:
        raise UserError("; ".join(faults))


def load(argv: list[str], *parts: type, choose: tuple | None = None, quiet: bool = True) -> object:
    """Return an instance of each part: its defaults, then the files in argv, then the flags.

    choose: (key, {value: further parts}), where the key's value decides which parts are added.
    One part alone is returned as such. Raises UserError with all faults at once.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(parts, choose), flush=True)
        sys.exit(0)
    settings = [s for arg in argv if not arg.startswith("--") for s in read_file(arg)]
    settings += [read_flag(arg) for arg in argv if arg.startswith("--")]
    others = {}  # keys of the parts that are not chosen -> the choice they belong to
    if choose:
        key, alternatives = choose
        default = {f.name: f.default for part in parts for f in fields(part)}[key]
        value = {name: value for name, value, _ in settings}.get(key, default)
        if str(value) not in alternatives:
            raise UserError(f"{key} must be one of {', '.join(alternatives)}, got {value!r}")
        parts += tuple(alternatives[value])
        for name, further in alternatives.items():
            others |= dict.fromkeys(key_types(*further), f": it is a key of {key} {name}")
    kinds, values, origin, faults = key_types(*parts), {}, {}, []
    for key, value, where in settings:
        if key not in kinds:
            names = difflib.get_close_matches(key, kinds, n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(names)}?)" if names else ""
            faults.append(f"{where}: unknown key {key!r}{others.get(key, hint)}")
            continue
        try:
            from_text = where == "command line" and isinstance(value, str)
            values[key] = parse(value, kinds[key]) if from_text else check(value, kinds[key])
            origin[key] = where
        except (ValueError, OverflowError, SyntaxError, KeyError):
            kind = inspect.formatannotation(kinds[key])
            faults.append(f"{where}: {key}={value!r} is not of type {kind}")
    if faults:
        raise UserError("\n  ".join(["the configuration has faults:", *faults, ADVICE]))
    return build(parts, values, origin, quiet)


def build(parts: tuple, values: dict, origin: dict[str, str], quiet: bool) -> object:
    """Return the instances, and print what differs from the defaults with its origin."""
    made = []
    faults = [f"{key} is empty: give a path" for key in PATHS if values.get(key) == ""]
    for part in parts:
        try:
            made.append(part(**{key: values[key] for key in key_types(part) if key in values}))
        except UserError as error:
            faults.append(str(error))
    if faults:
        given = ", ".join(f"{key}={values[key]!r} ({origin[key]})" for key in values)
        raise UserError(f"{'; '.join(faults)}\n  settings given: {given or 'none'}")
    if not quiet:
        print("settings: defaults, but")
        defaults = {field.name: field.default for part in parts for field in fields(part)}
        for key, value in as_dict(*made).items():
            if value != defaults[key]:
                print(f"  {key} = {value!r}  ({origin.get(key, 'derived')})")
    return made[0] if len(made) == 1 else made


def read_file(path: str) -> list[tuple[str, object, str]]:
    """Return (key, value, path) for every public name that a config file assigns."""
    if not os.path.isfile(path):
        raise UserError(f"config file {path!r} does not exist; write a flag as --key=value")
    names = {"__file__": path}
    try:
        with open(path, encoding="utf-8-sig") as f:
            text = f.read()
        if text.lstrip().startswith("{"):
            names |= json.loads(text)
            names.pop("force", None)  # that was for one start
        else:
            exec(compile(text, path, "exec"), names)
    except (Exception, SystemExit) as error:  # what is wrong in a user's file is theirs to mend
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"config file {path} does not run: {reason}; flags: --key=value") from None
    public = {key: value for key, value in names.items() if not key.startswith("_")}
    if public.get("force"):  # in a file it would start over at every requeue
        raise UserError(f"{path}: force is for one start: give --force on the command line")
    settings = [(k, v, path) for k, v in public.items() if not isinstance(v, types.ModuleType)]
    idle = names.get("__annotations__", {}).keys() - names.keys()  # "key: value", as in YAML
    if idle or not settings:
        raise UserError(f"{path}: {min(idle, default='it')} assigns nothing: write key = value")
    return settings


def read_flag(arg: str) -> tuple[str, object, str]:
    """Return (key, text, "command line") of --key=text; a bare flag has the value True."""
    key, equals, text = arg[2:].partition("=")  # at the first "=": the text may hold others
    key = key.replace("-", "_") + "_" * keyword.iskeyword(key)  # the field of --from is from_
    return key, text if equals else True, "command line"


def key_types(*parts: type) -> dict[str, type]:
    """Return the type of every key; a field with metadata key=False is none of the user's."""
    kinds = {}
    for part in parts:
        hints = typing.get_type_hints(part)
        for name in (field.name for field in fields(part) if field.metadata.get("key", True)):
            assert name not in kinds, f"two parts have the key {name}"
            kinds[name] = hints[name]
    return kinds


def parse(text: str, kind: type) -> object:
    """Return the value that a flag's text stands for; raise where it is not of the type."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in kinds:
        return text
    if types.NoneType in kinds and text in ("None", "none", ""):
        return None
    if bool in kinds:
        return WORDS[text.lower()]
    if kind == tuple[str, ...]:
        items = [item.strip(" '\"") for item in text.strip("()[] ").split(",")]
        return tuple(item for item in items if item)
    if typing.get_origin(kind) is tuple:
        text = f"[{text.strip('()[] ')}]"
    return check(ast.literal_eval(text.strip()), kind)


def check(value: object, kind: type) -> object:
    """Return a value as its type wants it, a list as a tuple; raise where it does not fit."""
    if type(value) in (int, float) and value != 0 and not 1e-30 <= abs(value) < 2**63:
        raise ValueError(value)  # beyond what torch and numpy can hold; nan and inf, too
    for option in typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        if option is float and type(value) in (int, float):
            return float(value)
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(check(item, typing.get_args(option)[0]) for item in value)
        if type(value) is option and option is not float:
            return value
    raise ValueError(value)


def help_text(parts: tuple, choose: tuple | None) -> str:
    """Return the program's docstring and one line per key: name, default, type, its comment."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), ""]
    lines += ["keys, as --key=value or in a config file (bare: True; a str: any text, even None):"]
    groups = {part: [] for part in parts}  # part -> the choices that add it
    for value, further in (choose[1] if choose else {}).items():
        for part in further:
            groups.setdefault(part, []).append(value)
    for part, values in groups.items():
        of = f" (only with {choose[0]}={' or '.join(values)})" if values else ""
        lines += ["", part.__doc__.partition("\n")[0] + of]
        notes = dict(re.findall(COMMENT, inspect.getsource(part), re.M))
        for key, kind in key_types(part).items():
            flag = f"  --{key.rstrip('_')}={getattr(part, key)!r}"
            lines.append(f"{flag:<34} {inspect.formatannotation(kind):<14} {notes.get(key, '')}")
    return "\n".join(lines)


def as_dict(*parts: object) -> dict:
    """Return the keys of all parts with their values."""
    return {key: getattr(part, key) for part in parts for key in key_types(type(part))}
