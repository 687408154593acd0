"""The command line: `edgeprune <command> [settings]`.

Settings are Hydra overrides (`trainer.steps=500`). Nothing heavy is imported before a command runs,
so that help is instant.
"""

import os
import re
import shlex
import sys
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from traceback import print_exception, walk_tb
from typing import TYPE_CHECKING, Any, NoReturn, get_origin

from edgeprune.commands import help
from edgeprune.config import (
    COMMANDS,
    CUSTOM,
    LESS_MEMORY,
    RUN_COMMANDS,
    TRAINERS,
    did_you_mean,
)
from edgeprune.errors import ConfigError, JobFailed, UserError
from edgeprune.paths import CONF, require_utf8

if TYPE_CHECKING:
    from argparse import Namespace

    from omegaconf import DictConfig


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n."""
    if arguments is None:
        _use_utf8()
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not os.environ.get("COLUMNS", "").strip("0"):  # a width of 0 would print nothing
        os.environ.pop("COLUMNS", None)
    _escape_output()
    try:
        for argument in rest:
            require_utf8(argument)
        if command in ("", "-h", "--help", "help"):
            print(help.overview(), flush=True)
            sys.exit(0 if command else 2)
        if "--version" in (command, *rest):
            print(f"edgeprune {version('edgeprune')}", flush=True)
            sys.exit(0)
        if command not in COMMANDS:
            hint = did_you_mean(command, COMMANDS) or f"; choose {', '.join(COMMANDS)}"
            raise ConfigError(f"unknown command {command!r}{hint}")
        if {"-h", "--help"} & set(rest):
            print(help.command_help(command, rest), flush=True)
            sys.exit(0)
        _run(command, _parse_flags(command, rest))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `| head` has read enough
        _drop_output()
        sys.exit(0)
    except Exception as error:
        if os.environ.get("EDGEPRUNE_TRACEBACK"):
            raise
        _report(command, error)


def _use_utf8() -> None:
    """Start again in Python's UTF-8 mode where the locale encodes file names in another way.

    Output keeps the locale's encoding.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _escape_output() -> None:
    """Escape characters that the encoding of the output lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ------------------------------------------------------------------------------------- arguments


def _parse_flags(command: str, arguments: list[str]) -> "Namespace":
    """Hydra's flags, in every form that Hydra accepts, and the other arguments as `overrides`.

    Raises ConfigError where Hydra would print its usage.
    """
    from hydra._internal.utils import get_args_parser

    def fail(message: str) -> NoReturn:
        raise ConfigError(
            f"{message}; settings are name=value (edgeprune {command} --help), flags are those of "
            f"Hydra (edgeprune {command} --hydra-help)"
        )

    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(arguments)
    given.config_dir = given.config_dir and os.path.expanduser(given.config_dir)
    return given


def _flags(given: "Namespace") -> list[str]:
    """The flags that were given, in their long form."""
    flags = {name: value for name, value in vars(given).items() if name != "overrides"}
    return [
        f"--{name.replace('_', '-')}{'' if value is True else f'={value}'}"
        for name, value in flags.items() if value not in (None, False)
    ]  # fmt: skip


def _complete(command: str, arguments: list[str], *, needs_path: bool = True) -> list[str]:
    """Hydra overrides from the arguments: paths get their name, `custom` is chosen for own files.

    `export RUN sparsity=0.9` -> `export run='RUN' sparsity=0.9`; several paths become a list.
    `prune model.path=~/X` -> `prune model=custom model.path=/home/me/X`.
    `draw RUN formats=png` -> `draw circuit='RUN' formats=[png]`. Raises ConfigError for an
    unknown setting, which Hydra would accept after a +, or the wrong number of paths.
    """
    arguments = [  # Hydra's grammar has no ~ in values
        re.sub(r"(?:^|(?<=[=,[]))~\w*/", lambda home: os.path.expanduser(home[0]), argument)
        for argument in arguments
    ]
    known, name = help.setting_names(command), help.POSITIONAL.get(command)
    keys = {argument: re.split("[=@]", argument.lstrip("+~"))[0] for argument in arguments}
    bare = {a for a in arguments if "=" not in a and a[:1] not in ("~", "+")}
    lists = {field.name for field in fields(COMMANDS[command]) if get_origin(field.type) is list}
    paths = [a for a in arguments if a in bare or (keys[a] not in known and os.path.exists(a))]
    others = [argument for argument in arguments if argument not in paths]
    for argument in others:
        if not keys[argument]:
            raise ConfigError(f"got {argument!r}; write name=value, without spaces around =")
        if keys[argument] not in known and not re.match("hydra[./=]", argument.lstrip("+~")):
            hint = f"{did_you_mean(keys[argument], known)} (see edgeprune {command} --help)"
            raise ConfigError(f"unknown setting {keys[argument]!r}{hint}")
    is_given = name in {keys[argument] for argument in others}
    needs_path = needs_path and command not in help.OPTIONAL
    is_right = len(paths) == 1 or (paths and command in help.SEVERAL) or not (paths or needs_path)
    if name is None and paths:
        raise ConfigError(f"unexpected argument {paths[0]!r}; settings are name=value")
    if name is not None and (paths if is_given else not is_right):
        raise ConfigError(f"got {len(paths)} paths; usage: {help.usage(command)}")
    if paths:
        value = ",".join(_quote(path) for path in paths)
        others.insert(0, f"{name}=[{value}]" if command in help.SEVERAL else f"{name}={value}")
    custom = [
        f"{group}={CUSTOM}" for group in ("model", "task")
        if f"{group}.path" in keys.values() and not {group, "experiment"} & set(keys.values())
    ]  # fmt: skip
    return custom + [_in_brackets(a) if keys.get(a) in lists else a for a in others]


def _in_brackets(argument: str) -> str:
    """The override of a list, whose brackets may be left out: `nodes=m1,m2` -> `nodes=[m1,m2]`."""
    return re.sub(r"=([^\[$].*)", r"=[\1]", argument, count=1, flags=re.DOTALL)


def _quote(text: str, mark: str = "'") -> str:
    """A string in Hydra's override grammar, where a backslash counts only before a quote."""
    parts = re.sub(
        rf"(\\*)({mark}|$)", lambda found: found[1] * 2 + found[2].replace(mark, f"\\{mark}"), text
    )
    return f"{mark}{parts}{mark}"


# ------------------------------------------------------------------------------------------- run


def register() -> None:
    """Make the settings classes known to Hydra, and `title`, which the default run_dir uses."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
    for name, schema in TRAINERS.items():
        store.store(group="trainer", name=f"{name}_schema", node=schema)

    def title(name: str, path: str | None) -> str:
        return os.path.basename(path) if path and name == CUSTOM else name

    OmegaConf.register_new_resolver("title", title, replace=True)


def _run(command: str, given: "Namespace") -> None:
    """Compose the settings with Hydra and run the command, or what one of Hydra's flags asks for.

    Under --multirun the command runs several times, in this process or wherever Hydra's launcher
    starts it. A run that fails reports why when it happens, and the others go on. All runs of a
    sweep are checked before the first one starts, if they run in this process.
    """
    overrides = given.overrides
    if not given.shell_completion:
        shows = given.cfg or given.info or given.hydra_help
        overrides = _complete(command, overrides, needs_path=not shows)
    is_sweep = given.multirun or "hydra.mode=MULTIRUN" in overrides
    if command not in RUN_COMMANDS and is_sweep:
        raise ConfigError(
            f"--multirun is for {' and '.join(RUN_COMMANDS)}; {command} takes one value per setting"
        )
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to standard error
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    register()
    process, only_checks = os.getpid(), False
    names: list[str] = []
    failures: list[tuple[str, Exception]] = []

    @hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")
    def job(settings: "DictConfig") -> None:
        nonlocal is_sweep
        if any(getattr(failure, "ends_sweep", False) for _, failure in failures):
            return
        is_sweep = HydraConfig.get().mode is RunMode.MULTIRUN  # or so says a config
        name = _name_of(settings) if is_sweep else command
        try:
            _run_job(command, settings, earlier=names if only_checks else None)
        except Exception as error:  # Hydra would print a traceback of its own
            failures.append((name, error))
            if is_sweep:
                failed = _report_run(command, name, error)
                if os.getpid() != process:  # the launcher passes it on to the first process
                    raise failed from None
        names.append(name)

    sys.argv = [f"edgeprune {command}", *overrides, *_flags(given)]  # overrides precede flags
    if is_sweep and not any(a.startswith(("hydra/", "launcher=")) for a in overrides):
        only_checks = True
        job()
        if failures:
            raise _sweep_failed(command, failures, f"{len(names)} runs cannot start, so none did")
        only_checks = False
        names.clear()
    job()
    if failures and is_sweep:
        raise _sweep_failed(command, failures, f"{len(names)} runs did not finish")
    for _, failure in failures:
        raise failure


def _run_job(command: str, settings: "DictConfig", earlier: list[str] | None) -> None:
    """Run the command, here or as a job of a launcher elsewhere.

    With the names of a sweep's `earlier` runs, only check the settings.
    """
    from omegaconf import OmegaConf

    from edgeprune.commands.console import print_log

    _escape_output()
    register()
    print_log()  # Hydra has disabled all loggers
    config: Any = OmegaConf.to_object(settings)
    if earlier is None:
        getattr(import_module(f"edgeprune.commands.{command}"), command)(config)
    elif config.run_dir in earlier:
        raise ConfigError(
            f"several runs of this sweep go to {config.run_dir}; name in run_dir what they "
            "differ in, such as run_dir='runs/${ablation.kind}-${seed}'"
        )


def _name_of(settings: "DictConfig") -> str:
    """The name of a sweep's run in messages: its run_dir, or its overrides if that is not known."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        return os.path.expanduser(settings.run_dir)
    except OmegaConfBaseException:
        return " ".join(HydraConfig.get().overrides.task)


# ---------------------------------------------------------------------------------------- errors


def _report(command: str, error: Exception) -> NoReturn:
    """Report what went wrong in one message, and exit."""
    message, code, on_every_rank = _explain(command, error)
    if isinstance(error, OSError) and error.errno and error.filename is None:
        _drop_output()
    _fail(message, code, on_every_rank=on_every_rank)


def _report_run(command: str, name: str, error: Exception) -> JobFailed:
    """Report why a run of a sweep failed; returns the same as an error for other processes."""
    if os.environ.get("EDGEPRUNE_TRACEBACK"):
        print_exception(error)
    message, code, on_every_rank = _explain(command, error)
    _print_error(f"{name}: {message}", on_every_rank=on_every_rank)
    failed = JobFailed(f"{name}: {message}")
    failed.exit_code = code
    return failed


def _sweep_failed(command: str, failures: list[tuple[str, Exception]], what: str) -> JobFailed:
    """The error that ends a sweep; it has the exit code of the last failure."""
    names = ", ".join(dict.fromkeys(name for name, _ in failures))
    failed = JobFailed(f"{len(failures)} of {what}: {names}; the reasons are given above")
    _, failed.exit_code, failed.on_every_rank = _explain(command, failures[-1][1])
    return failed


def _explain(command: str, error: Exception) -> tuple[str, int, bool]:
    """What went wrong in one message, the exit code, and whether every process has the error."""
    if isinstance(error, UserError):
        return str(error), error.exit_code, error.on_every_rank
    if _is_from(error, "hydra.", "omegaconf."):
        return _explain_hydra(command, error), 2, True
    if _is_from(error, "joblib.", "submitit."):
        return f"a run was lost by its launcher: {error}", 1, False
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        first = str(error).strip().splitlines()[0]
        return f"out of memory ({first}). {LESS_MEMORY}", 1, False
    if _is_from(error, "edgeprune."):
        return str(error), 1, False
    if isinstance(error, OSError):
        return f"{error.filename or 'cannot write'}: {error.strerror or error}", 1, False
    where = "(this is a bug; EDGEPRUNE_TRACEBACK=1 shows where)"
    return f"unexpected {type(error).__name__}: {error} {where}", 1, False


def _is_from(error: Exception, *packages: str) -> bool:
    """Whether a package defines the error's class, or raised it as a ValueError."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    where = frames[-1].f_globals.get("__name__", "") if frames else ""
    is_value = isinstance(error, (ValueError, AssertionError))
    return type(error).__module__.startswith(packages) or (is_value and where.startswith(packages))


def _explain_hydra(command: str, error: Exception) -> str:
    """An error of Hydra or OmegaConf in one line, with the valid choices."""
    text = str(error)
    missing = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if missing and missing[0].endswith("submitit_slurm'"):
        return "launcher=slurm needs a package; pip install 'edgeprune[slurm]'"
    if missing and missing[1] in help.GROUPS:
        group, name = missing.groups()
        own = f"; {group}=custom {group}.path=... takes your own"
        own = own if group in ("model", "task") else ""
        return f"unknown {group} {name!r}; choose {', '.join(help.choices_of(group))}{own}"
    if "Unexpected type for root: NoneType" in str(error):
        return (
            "a part of the run's model, task or ablation cannot change alone; give model=, task= "
            "or ablation= as well"
        )
    if hasattr(error, "override"):
        return _explain_override(error.override, text)
    lines = [line.strip() for line in str(error.__cause__ or text).splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith("object_type")]
    return f"{'; '.join(wanted)} (all settings: edgeprune {command} --help)"


def _explain_override(override: str, reason: str) -> str:
    """An override that Hydra's grammar does not have, and how to write it."""
    name, _, value = override.partition("=")
    found = re.search(r"(?:at:|mismatched input) '([^<]+?)'", reason)
    what = f" because of {found[1]!r}" if found else ""
    quoted = _quote(value, '"')
    return (
        f"{override!r} cannot be parsed{what}; text with special characters needs quotes inside "
        f"the shell's: {shlex.quote(f'{name}={quoted}')} (Hydra's override grammar)"
    )


def _fail(message: str, code: int, *, on_every_rank: bool = False) -> NoReturn:
    _print_error(message, on_every_rank=on_every_rank)
    sys.exit(code)


def _print_error(message: str, *, on_every_rank: bool = False) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not on_every_rank:
        process = f" (process {rank})" if rank else ""
        print(f"edgeprune{process}: {message}", file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Discard what cannot be printed, so that exiting does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
