"""Properties of configurator.py, on a small dataclass of its own."""

import json
import math
import re
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import align
import configurator
import convert
import data
import sample
import train
from bench.__main__ import BenchConfig
from configurator import UserError, load
from evals.base import EvalConfig
from evals.report import ReportConfig
from runtime.files import write_json
from speedrun import SpeedrunConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """The keys."""

    out_dir: str = "out/x"  # run folder
    seed: int = 7  # initial weights
    learning_rate: float = 1e-3  # peak, per step
    n_layer: int = 4  # blocks
    window: int | None = None  # tokens; None = all
    compile: bool = False  # torch.compile
    auto: bool | None = None  # None = decide later
    init_from: str | None = None  # a run folder
    tasks: tuple[str, ...] = ()  # which tasks
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    derived: int | None = None  # None = 2 n_layer
    text: str | None = None  # of a prompt

    def __post_init__(self):
        if self.derived is None:
            self.derived = 2 * self.n_layer
        if self.n_layer < 1:
            raise UserError(f"n_layer must be in [1, 1e3], got {self.n_layer}")


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "config.py") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(argv) -> str:
    with pytest.raises(UserError) as error:
        load(argv, Config)
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# Order and types


def test_nothing_given_gives_the_defaults():
    """The dataclass is the one place where defaults stand."""
    assert load([], Config) == Config()


@pytest.mark.parametrize("flags_first", [True, False])
def test_defaults_then_files_in_order_then_flags(file, flags_first):
    """A flag wins over every file wherever it stands; of two files the later wins;
    the rest stays."""
    files = [
        file("seed = 1\nn_layer = 1\nlearning_rate = 0.1", "a.py"),
        file("n_layer = 2\nlearning_rate = 0.2", "b.py"),
    ]
    flags = ["--learning_rate=0.3"]
    cfg = load(flags + files if flags_first else files + flags, Config)
    assert (cfg.out_dir, cfg.seed, cfg.n_layer, cfg.learning_rate) == ("out/x", 1, 2, 0.3)
    assert load(["--seed=1", "--seed=2"], Config).seed == 2


def test_a_bare_flag_is_true_and_a_dash_is_an_underscore():
    """--compile and --learning-rate are what people type."""
    cfg = load(["--compile", "--auto", "--learning-rate=0.5"], Config)
    assert cfg.compile is True and cfg.auto is True and cfg.learning_rate == 0.5


@pytest.mark.parametrize(
    "flag, key, value",
    [
        ("--n_layer=12", "n_layer", 12),
        ("--seed=-3", "seed", -3),
        ("--learning_rate=3", "learning_rate", 3.0),
        ("--learning_rate=6e-4", "learning_rate", 6e-4),
        ("--compile=true", "compile", True),
        ("--compile=False", "compile", False),
        ("--compile=1", "compile", True),
        ("--compile=no", "compile", False),
        ("--auto=false", "auto", False),
        ("--auto=None", "auto", None),
        ("--window=None", "window", None),
        ("--window=none", "window", None),
        ("--window=", "window", None),
        ("--window=8", "window", 8),
        ("--init_from=None", "init_from", "None"),
        ("--text=", "text", ""),
        ("--init_from=a", "init_from", "a"),
        ("--out_dir=None", "out_dir", "None"),
        ("--out_dir=7", "out_dir", "7"),
        ("--out_dir=a=b=c", "out_dir", "a=b=c"),
        ("--out_dir==", "out_dir", "="),
        ("--out_dir=--seed=1", "out_dir", "--seed=1"),
        ("--tasks=a,b", "tasks", ("a", "b")),
        ("--tasks=a", "tasks", ("a",)),
        ("--tasks=", "tasks", ()),
        ("--tasks=x=1,y=2", "tasks", ("x=1", "y=2")),
        ("--tasks=('a', 'b')", "tasks", ("a", "b")),
        ("--betas=(0.9, 1)", "betas", (0.9, 1.0)),
        ("--betas=[0.5]", "betas", (0.5,)),
    ],
)
def test_a_flag_is_read_as_the_type_of_its_field(flag, key, value):
    """Types come from the dataclass, so "7" is text for a folder and a number for a seed; only the
    first = splits."""
    got = getattr(load([flag], Config), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ("betas = [0, 1]", "betas", (0.0, 1.0)),
        ("tasks = ('a',)", "tasks", ("a",)),
        ("window = None", "window", None),
        ("window = 2 ** 4", "window", 16),
        ("compile = 1 < 2", "compile", True),
        ("out_dir = 'a=b'", "out_dir", "a=b"),
        ("import os\n_half = 3\nn_layer = 2 * _half", "n_layer", 6),
        ("out_dir = 'Größe'", "out_dir", "Größe"),
    ],
)
def test_a_file_assigns_python_values(file, line, key, value):
    """An int does for a float, a list for a tuple; imported modules and _private names are no
    settings."""
    got = getattr(load([file(line)], Config), key)
    assert got == value and type(got) is type(value)


@given(st.text())
def test_any_text_survives_the_command_line(text):
    """Paths with spaces, =, quotes, unicode or -- reach the program as typed."""
    assert load([f"--text={text}"], Config).text == text


SIZES = st.floats(1e-30, 9e18) | st.floats(-9e18, -1e-30) | st.just(0.0)


@given(SIZES, st.integers(-(2**63) + 1, 2**63 - 1))
def test_numbers_survive_the_command_line(x, i):
    """repr and back, to the last bit."""
    cfg = load([f"--learning_rate={x!r}", f"--seed={i}"], Config)
    assert cfg.learning_rate == x and cfg.seed == i


def test_a_file_runs_in_a_namespace_of_its_own(file):
    """It sees neither the configurator's names nor an earlier file's, and leaves nothing behind."""
    assert "NameError" in refusal([file("seed = 1", "a.py"), file("n_layer = seed", "b.py")])
    assert "NameError" in refusal([file("seed = len(argv)")])
    assert "NameError" in refusal([file("seed = UserError")])


# ------------------------------------------------------------------------------------------------
# Refusals


def test_an_unknown_key_is_refused_with_the_nearest_ones(file):
    """A misspelt key that passes silently costs a whole run, from a file as from
    the command line."""
    path = file("lerning_rate = 1e-3")
    message = refusal([path])
    assert (
        path in message and "'lerning_rate'" in message and "did you mean learning_rate" in message
    )
    message = refusal(["--n_layers=2"])
    assert (
        "command line" in message and "'n_layers'" in message and "did you mean n_layer" in message
    )
    assert "did you mean" not in refusal(["--qqqq=2"])


def test_all_faults_are_listed_at_once(file):
    """One attempt per fault is what wears people out on a cluster."""
    message = refusal(
        [file("sed = 1\nn_layer = 'four'"), "--learning_rate=abc", "--bogus", "--compile=maybe"]
    )
    assert all(
        part in message
        for part in (
            "'sed'",
            "n_layer='four'",
            "learning_rate='abc'",
            "'bogus'",
            "compile='maybe'",
            "--help",
        )
    )


@pytest.mark.parametrize(
    "flag",
    [
        "--n_layer=1.5",
        "--n_layer=two",
        "--n_layer",
        "--n_layer=",
        "--n_layer=True",
        "--window=x",
        "--learning_rate=abc",
        "--learning_rate",
        "--learning_rate=",
        "--compile=2",
        "--compile=",
        "--out_dir",
        "--init_from",
        "--tasks",
        "--betas=0.9,x",
    ],
)
def test_a_flag_of_the_wrong_type_is_refused_with_key_value_and_type(flag):
    """A bare flag is True, and True is no number, path or list."""
    key = flag[2:].split("=")[0]
    message = refusal([flag])
    assert f"{key}=" in message and "not of type" in message and flag.partition("=")[2] in message


@pytest.mark.parametrize(
    "line",
    [
        "n_layer = 1.0",
        "n_layer = True",
        "n_layer = None",
        "n_layer = '4'",
        "learning_rate = '1e-3'",
        "learning_rate = True",
        "compile = 1",
        "compile = 'true'",
        "out_dir = None",
        "out_dir = 3",
        "tasks = 'a'",
        "tasks = (1,)",
        "betas = (None,)",
    ],
)
def test_a_file_value_of_the_wrong_type_is_refused(file, line):
    """In Python the types are already there: nothing is guessed, and True is no int."""
    message = refusal([file(line)])
    assert line.split()[0] + "=" in message and "not of type" in message


@pytest.mark.parametrize("text", ["nan", "NaN", "inf", "-inf", "infinity", "1e400"])
def test_nan_and_infinity_are_refused_as_flags(text):
    """float() takes them, and every range check of the form x < low lets nan pass."""
    assert "learning_rate" in refusal([f"--learning_rate={text}"])
    assert "betas" in refusal([f"--betas=0.9,{text}"])


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-1e400", "10 ** 400"])
def test_nan_and_infinity_are_refused_in_files(file, value):
    """So is an int too large to be a float."""
    assert "learning_rate" in refusal([file(f"learning_rate = {value}")])
    assert "betas" in refusal([file(f"betas = (0.9, {value})")])


@pytest.mark.parametrize(
    "text, error",
    [
        ("seed = 1 / 0", "ZeroDivisionError"),
        ("seed = = 1", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("seed = unknown", "NameError"),
        ("raise ValueError('why')", "why"),
        ("\0", "config.py"),
    ],
)
def test_a_config_file_that_does_not_run_is_refused_with_its_error(file, text, error):
    """Its author needs the path and the cause, not our traceback."""
    path = file(text)
    message = refusal([path])
    assert path in message and error in message


def test_a_missing_config_file_is_named():
    """With a hint where a flag lost its dashes."""
    assert "'config/none.py'" in refusal(["config/none.py"])
    assert "--" in refusal(["seed=3"]) and "'seed=3'" in refusal(["seed=3"])
    assert "'-x'" in refusal(["-x"])


def test_a_folder_or_a_file_in_another_encoding_is_refused(tmp_path):
    """Neither is a config file, and both come up by a slip of the shell's completion."""
    assert str(tmp_path) in refusal([str(tmp_path)])
    (tmp_path / "latin.py").write_bytes("out_dir = 'Gr\xf6\xdfe'".encode("latin-1"))
    assert "latin.py" in refusal([str(tmp_path / "latin.py")])


@pytest.mark.parametrize(
    "key",
    [
        "out_dir",
        "init_from",
        "tasks",
        "seed",
        "learning_rate",
        "window",
        "compile",
        "betas",
        "unknown",
    ],
)
def test_code_in_a_value_is_never_executed(tmp_path, key):
    """Values come from scripts and job arrays: they are text, whatever they look like."""
    marker = tmp_path / "marker"
    for code in (
        f"__import__('pathlib').Path({str(marker)!r}).touch()",
        f"$(touch {marker})",
        f"`touch {marker}`",
    ):
        try:
            cfg = load([f"--{key}={code}"], Config)
        except UserError:
            continue
        assert key in ("out_dir", "init_from", "tasks") and isinstance(
            getattr(cfg, key), (str, tuple)
        )
    assert not marker.exists()


def test_what_the_dataclass_refuses_is_shown_with_the_settings_given(file):
    """Its message knows the values, the configurator knows where they came from."""
    path = file("n_layer = 0")
    message = refusal([path, "--seed=5"])
    assert (
        "n_layer must be in [1, 1e3], got 0" in message
        and f"n_layer=0 ({path})" in message
        and "seed=5 (command line)" in message
    )


# ------------------------------------------------------------------------------------------------
# What is shown and saved


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_key_with_type_default_and_comment(capsys, flag):
    """The dataclass is the manual; help comes before any complaint about the other arguments."""
    with pytest.raises(SystemExit) as end:
        load(["--bogus", flag], Config)
    assert end.value.code == 0
    lines = {
        match[1]: line
        for line in capsys.readouterr().out.splitlines()
        if (match := re.match(r"\s+--(\w+)=", line))
    }
    assert list(lines) == list(asdict(Config()))
    for key, default, kind, comment in (
        ("out_dir", "'out/x'", "str", "run folder"),
        ("learning_rate", "0.001", "float", "peak, per step"),
        ("n_layer", "4", "int", "blocks"),
        ("window", "None", "int | None", "tokens; None = all"),
        ("compile", "False", "bool", "torch.compile"),
        ("tasks", "()", "tuple[str, ...]", "which tasks"),
        ("betas", "(0.9, 0.95)", "tuple[float, ...]", "of AdamW"),
        ("auto", "None", "bool | None", "None = decide later"),
        ("text", "None", "str | None", "of a prompt"),
    ):
        assert re.fullmatch(
            rf"\s*--{key}={re.escape(default)}\s+{re.escape(kind)}\s+{re.escape(comment)}",
            lines[key],
        ), lines[key]


PROGRAMS = {
    "train": (train.ModelConfig, train.LoopConfig, train.PretrainConfig),
    "align": (train.LoopConfig, align.AlignConfig, *align.MODES["sft"]),
    "dpo": align.MODES["dpo"],
    "verifier": align.MODES["verifier"],
    "eval": (EvalConfig,),
    "data": (data.DataConfig,),
    "sample": (sample.SampleConfig,),
    "convert": (convert.ConvertConfig,),
}


@pytest.mark.parametrize("parts", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_every_program_lists_a_comment_for_every_key(parts):
    """A key without unit or range is one that nobody dares to set."""
    shown = configurator.help_text(parts, None)
    for key in configurator.key_types(*parts):
        assert re.search(rf"^  --{key.rstrip('_')}=\S.*  +\S.* {{1,}}\S", shown, re.M), key


OTHERS = (ReportConfig, SpeedrunConfig, BenchConfig)
NUMBERS = [
    (part, key)
    for parts in (*PROGRAMS.values(), OTHERS)
    for part in parts
    for key, kind in configurator.key_types(part).items()
    if {int, float} & {kind, *typing.get_args(kind)}
]


@pytest.mark.parametrize(
    "part, key", NUMBERS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_every_number_has_a_lower_bound(part, key):
    """A range that nobody checks is found by whoever types a wrong sign."""
    needed = {"init_from": "x"} if part is align.AlignConfig else {}
    with pytest.raises(UserError, match=rf"{key}.* must be .*got -1000"):
        part(**needed, **{key: -1000})


ANY_SIZE = ("-1", "0", "1e-40", "1e40", "inf", "-inf", "nan", "1e-30", "9e18", str(2**63 - 1))


@pytest.mark.parametrize(
    "part, key", NUMBERS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
def test_every_number_of_any_size_is_taken_or_refused_in_words(part, key):
    """A number that passes is finite and fits a float32; one that does not is named."""
    needed = ["--init_from=x"] if part is align.AlignConfig else []
    for text in ANY_SIZE:
        try:
            value = getattr(load([*needed, f"--{key}={text}"], part), key)
        except UserError as error:
            assert key in str(error)
            continue
        values = value if isinstance(value, tuple) else (value,)
        assert all(0 <= x <= 2**63 and (x == 0 or x >= 1e-30) for x in values)


FOLDERS = [
    (part, key)
    for parts in (*PROGRAMS.values(), OTHERS)
    for part in parts
    for key in configurator.key_types(part)
    if key in ("out_dir", "data_dir", "local_dir", "checkpoint", "init_from", "out", "dest")
]


@pytest.mark.parametrize("part, key", FOLDERS)
def test_an_empty_path_is_refused(part, key, file):
    """--out_dir=$UNSET must neither fill the working directory nor end in a traceback.

    And --init_from=$UNSET must not begin from initial weights.
    """
    assert {key for _, key in FOLDERS} == set(configurator.PATHS)
    needed = {"--stage=dpo"} if part is SpeedrunConfig else set()
    for argv in ([f"--{key}="], [file(f"{key} = ''")]):
        with pytest.raises(UserError, match=f"{key} is empty"):
            load([*argv, *needed], part)


# ------------------------------------------------------------------------------------------------
# Parts, choices, bounds


@dataclass
class Sizes:
    """The sizes."""

    width: int = 2  # of a layer
    mode: str = "wide"  # wide or deep


@dataclass
class Wide:
    """Wide things."""

    spread: float = 0.5  # of the width


@dataclass
class Deep:
    """Deep things."""

    depth: int = 3  # layers


CHOICE = ("mode", {"wide": (Wide,), "deep": (Deep, Config)})


def test_a_choice_adds_its_parts():
    """The value of one key decides which other keys there are."""
    assert load([], Sizes, choose=CHOICE) == [Sizes(), Wide()]
    sizes, deep, config = load(["--mode=deep", "--depth=4", "--seed=1"], Sizes, choose=CHOICE)
    assert (sizes.mode, deep.depth, config.seed) == ("deep", 4, 1)


def test_a_key_of_another_choice_is_refused_with_the_choice_it_belongs_to(file):
    """A key that is accepted and ignored is worse than none."""
    for argv in (["--depth=4"], [file("depth = 4")], ["--mode=wide", "--spread=1", "--depth=4"]):
        with pytest.raises(UserError, match=r"unknown key 'depth': it is a key of mode deep"):
            load(argv, Sizes, choose=CHOICE)
    for value in ("high", "", "0"):
        with pytest.raises(UserError, match="mode must be one of wide, deep"):
            load([f"--mode={value}"], Sizes, choose=CHOICE)


def test_two_parts_with_one_key_are_a_mistake_of_ours():
    """One flat set of keys: the value of such a key would belong to whom?"""
    with pytest.raises(AssertionError, match="two parts have the key out_dir"):
        load([], Config, Wide, Config)


def test_faults_of_all_parts_are_listed_at_once():
    """As those of one part are."""
    with pytest.raises(UserError) as error:
        load(["--max_steps=0", "--n_layer=0"], train.LoopConfig, train.ModelConfig)
    assert "max_steps must be at least 1" in str(error.value)
    assert "n_layer must be in [1, 1e3]" in str(error.value)


def test_help_groups_the_keys_by_part_and_names_the_choice():
    """52 keys in one list are read by nobody."""
    text = configurator.help_text((Sizes,), CHOICE)
    heads = [line for line in text.splitlines() if line and not line.startswith("  ")]
    assert heads[-4:] == [
        "The sizes.",
        "Wide things. (only with mode=wide)",
        "Deep things. (only with mode=deep)",
        "The keys. (only with mode=deep)",
    ]


@pytest.mark.parametrize(
    "interval, inside, outside, words",
    [
        ("[1, inf)", (1, 7, 1e300), (0, -1, 0.999, math.inf), "must be at least 1"),
        ("(0, inf)", (1e-40, 1), (0, -1, math.inf), "must be above 0"),
        ("[0, 1]", (0, 0.5, 1), (-1e-9, 1.1), r"must be in \[0, 1\]"),
        ("[0, 0.5)", (0, 0.49), (0.5, -1), r"must be in \[0, 0.5\)"),
    ],
)
def test_require_knows_open_and_closed_ends(interval, inside, outside, words):
    """beta1 = 1 divides by zero, warmup_frac = 1 is a plan: the ends matter."""
    for value in (*inside, None, ()):
        configurator.require(SimpleNamespace(x=value), {interval: "x"})
    configurator.require(SimpleNamespace(x=inside), {interval: "x"})
    for value in (*outside, math.nan):
        for given_value in (value, (inside[0], value)):
            with pytest.raises(UserError, match=rf"x {words}, got {value}"):
                configurator.require(SimpleNamespace(x=given_value), {interval: "x"})


def test_differences_from_the_defaults_are_printed_with_their_origin(file, capsys):
    """A log that begins with what is special about the run; equal to the default is not special."""
    path = file("n_layer = 3\nseed = 7")
    load([path, "--compile", "--tasks=a,b"], Config, quiet=False)
    out = capsys.readouterr().out
    assert (
        f"n_layer = 3  ({path})" in out
        and "compile = True  (command line)" in out
        and "tasks = ('a', 'b')  (command line)" in out
    )
    assert "derived = 6  (derived)" in out and "seed" not in out and "learning_rate" not in out
    load([path], Config)
    assert capsys.readouterr().out == ""


def test_the_saved_json_gives_the_same_configuration_again(tmp_path):
    """It is saved with the run to repeat it: every field, through JSON's lists and nulls, back to
    an equal object."""
    flags = ["--learning_rate=0.1", "--tasks=a,b", "--out_dir=Größe = 1", "--compile", "--window=3"]
    cfg = load(flags, Config)
    path = tmp_path / "config.json"
    write_json(str(path), configurator.as_dict(cfg))
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert set(saved) == set(asdict(cfg))
    types = configurator.key_types(Config)
    again = {key: configurator.check(value, types[key]) for key, value in saved.items()}
    assert Config(**again) == cfg


# ------------------------------------------------------------------------------------------------
# Files that are no Python recipe


def test_a_saved_config_json_is_a_config_file(tmp_path):
    """A run is repeated by the file that it left; other keys are refused by name as ever."""
    cfg = load(["--learning_rate=0.1", "--tasks=a,b", "--compile", "--window=3"], Config)
    path = str(tmp_path / "config.json")
    write_json(path, configurator.as_dict(cfg))
    assert load([path], Config) == cfg
    assert load([path, "--window=4"], Config).window == 4
    write_json(path, {"seed": 3, "n_expert": 2, "betas": ["x"]})
    assert "unknown key 'n_expert'" in refusal([path]) and "betas=['x']" in refusal([path])


@dataclass
class Forced:
    """With a wish that deletes."""

    force: bool = False  # start over


def test_a_saved_force_is_not_repeated(file):
    """It was meant for one start: the saved file must not delete what that start has made."""
    path = file('{"force": true, "seed": 3}', "config.json")
    forced, cfg = load([path], Forced, Config)
    assert not forced.force and cfg.seed == 3
    assert load([path, "--force"], Forced, Config)[0].force


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["assigns nothing"]),
        ("# seed = 3\n", ["assigns nothing"]),
        ('"""Words."""\nimport os\n_seed = 3', ["assigns nothing"]),
        ("seed: 3\nn_layer: 4\n", ["n_layer", "assigns nothing"]),  # YAML
        ("seed = 3\nn_layer: 4", ["n_layer", "assigns nothing"]),
        ("out_dir: 'x'", ["out_dir", "assigns nothing"]),
        ("data: toy", ["NameError"]),
        ("- seed\n- 3", ["NameError"]),
        ("[train]\nseed = 3", ["NameError"]),  # TOML, INI
        ("[1, 2]", ["assigns nothing"]),  # JSON, but no object
        ("3", ["assigns nothing"]),
        ('"seed"', ["assigns nothing"]),
        ("null", ["NameError"]),
        ("{}", ["assigns nothing"]),
        ('{"seed": 3', ["JSONDecodeError"]),
        ('{"seed": NaN}', ["seed=nan"]),
        ('{"learning_rate": 1e400}', ["learning_rate=inf"]),
        ("exit()", ["SystemExit"]),
        ("raise SystemExit(0)", ["SystemExit"]),
    ],
)
@pytest.mark.parametrize("name", ["config.yaml", "config.json", "config.py"])
def test_a_file_that_sets_nothing_is_refused(file, text, words, name):
    """Else all defaults would be used: the suffix does not matter, what is in the file does."""
    path = file(text, name)
    message = refusal([path])
    assert path in message and all(word in message for word in words)


def test_an_annotated_assignment_and_a_byte_order_mark_are_fine(file):
    """The one is good Python, the other what an editor on Windows adds."""
    assert load([file("seed: int = 3")], Config).seed == 3
    assert load([file("\ufeffseed = 4")], Config).seed == 4
    assert load([file('\ufeff{"seed": 5}', "config.json")], Config).seed == 5


@pytest.mark.parametrize("argv", [["--seed", "3"], ["--seed", "=", "3"], ["--seed", "=3"]])
def test_a_value_after_a_blank_is_refused_with_the_right_way_to_write_it(argv, file):
    """argparse takes it so; and a value may be the name of a file that is there."""
    assert "--key=value" in refusal(argv)
    assert "--key=value" in refusal(["--init_from", file("IQ== 0\nIg== 1", "gpt2.tiktoken")])
    assert "--key=value" in refusal(["--init_from", file("seed = 3")])


# ------------------------------------------------------------------------------------------------
# Numbers of any size


@pytest.mark.parametrize("text", ["1e-40", "-1e-31", "1e40", "1e19", "5e-324", "-1e300"])
def test_numbers_beyond_what_tensors_hold_are_refused(text, file):
    """In float32 1e-40 divides to infinity, and 0 times 1e40 is nan."""
    assert "learning_rate" in refusal([f"--learning_rate={text}"])
    assert "betas" in refusal([f"--betas=0.9,{text}"])
    assert "learning_rate" in refusal([file(f"learning_rate = {text}")])


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**40, 10**400])
def test_integers_beyond_64_bits_are_refused(value, file):
    """numpy and torch overflow on them, each in its own way."""
    assert "seed" in refusal([f"--seed={value}"])
    assert "window" in refusal([f"--window={value}"])
    assert "seed" in refusal([file(f"seed = {value}")])
    assert "learning_rate" in refusal([file(f"learning_rate = {value}")])
