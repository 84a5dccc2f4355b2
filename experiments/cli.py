"""The command line that every experiment shares: a config file, overrides of its fields, one line for what is wrong."""

import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs.common import base
from effattn_jax.checks import ArgumentError
from effattn_jax.training.journal import NonFiniteLoss
from effattn_jax.training.restore import CheckpointError

CONFIG = config_flags.DEFINE_config_file("config", None, "the config file; --config.<field>=<value> overrides a field")
WORKDIR = flags.DEFINE_string("workdir", None, "where the run's files are; default: runs/<name of the config file>")

EXPECTED = (ArgumentError, FileNotFoundError, CheckpointError, NonFiniteLoss)
"""Errors of the user's world rather than of the program: their message says all."""


def run(
    main: Callable[[ConfigDict, str], None],
    description: str | None,
    *,
    without_config: Callable[[], None] | None = None,
    own_flags: Sequence[flags.FlagValues] = (),
) -> None:
    """Parse the command line and call `main(config, workdir)`; `--help` shows the description and every field.

    Where an experiment needs no config, `without_config` is called if none is given. An experiment's `own_flags` are
    known while it runs: the flags of two experiments may have the same name.
    """
    argv = sys.argv
    if any(argument in ("--help", "-h", "--helpfull", "--helpshort") for argument in argv[1:]):
        print(_help(description, argv, own_flags))
        return
    path = _config_path(argv)
    if path and not os.path.isfile(path):
        _stop(f"--config: no such file: {path}", 2)
    try:
        rest = _parse(argv, own_flags)
    except flags.Error as error:
        _stop(str(error), 2)
    except (AttributeError, KeyError) as error:
        _stop(_unknown_field(argv) or f"--config: {error}", 2)
    if rest:
        _stop(f"got the argument {rest[0]!r}; everything is a flag: --config.<field>=<value>", 2)
    if CONFIG.value is None and without_config is None:
        _stop("--config is needed, for example --config=configs/quickstart.py (--help shows all flags)", 2)
    try:
        if CONFIG.value is not None:
            main(CONFIG.value, os.path.abspath(WORKDIR.value or os.path.join("runs", config_name())))
        elif without_config is not None:
            without_config()
    except EXPECTED as error:
        _stop(str(error), 1)


def _parse(argv: Sequence[str], own_flags: Sequence[flags.FlagValues]) -> list[str]:
    """Give every flag its value; what is not a flag."""
    for own in own_flags:
        own.unparse_flags()
        flags.FLAGS.append_flag_values(own)
    try:
        rest = flags.FLAGS(argv)[1:]
    finally:
        for own in own_flags:
            flags.FLAGS.remove_flag_values(own)
            own.mark_as_parsed()
    return rest


def config_name() -> str:
    """Of the config file, without its folder and suffix."""
    return os.path.splitext(os.path.basename(_config_path(sys.argv)))[0]


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _config_path(argv: Sequence[str]) -> str:
    """The file given as --config=file or --config file."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config":
            return (value if equals else following).partition(":")[0]
    return ""


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """Every field by its full name."""
    fields: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            fields |= _fields(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _load(argv: Sequence[str]) -> ConfigDict:
    path = _config_path(argv)
    if not path:
        return base()
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        return base()
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _unknown_field(argv: Sequence[str]) -> str | None:
    """A line on the first override that names no field, with the fields that look like it."""
    known = list(_fields(_load(argv)))
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.")
        if field == name or field in known:
            continue
        last = {full.rpartition(".")[2]: full for full in known}
        near = difflib.get_close_matches(field, known, n=3, cutoff=0.6)
        near += [last[word] for word in difflib.get_close_matches(field.rpartition(".")[2], list(last), n=3)]
        which = f"near ones: {', '.join(dict.fromkeys(near))}" if near else "--help lists the fields"
        return f"--config.{field}: no such field; {which}"
    return None


def _help(description: str | None, argv: Sequence[str], own_flags: Sequence[flags.FlagValues]) -> str:
    path = _config_path(argv)
    lines = [
        (description or "").strip(),
        "",
        "flags:",
        "  --config=<file>            a file of configs/",
        "  --config.<field>=<value>   overrides a field",
        "  --workdir=<directory>      where the run's files are; default: runs/<name of the config file>",
    ]
    for flag in [own[name] for own in own_flags for name in own]:
        meaning = " ".join(flag.help.split())
        lines.append(f"  --{flag.name}=<{flag.flag_type()}>  {meaning} (default: {flag.default})")
    meaning = (base.__doc__ or "").strip("\n")
    lines += [
        "",
        "what the fields mean:",
        meaning.rstrip(),
        "",
        f"fields of {path or 'every config'} and their values:",
    ]
    lines += [f"    {name} = {value!r}" for name, value in sorted(_fields(_load(argv)).items())]
    return "\n".join(lines)
