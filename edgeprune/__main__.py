"""The command line: `edgeprune <command> [settings]`.

Settings are Hydra overrides (`trainer.steps=500`). Nothing heavy is imported before a command runs,
so that help is instant.
"""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import Any, NoReturn

from edgeprune.commands.help import (
    GROUPS,
    POSITIONAL,
    SEVERAL,
    choices_of,
    command_help,
    overview,
    setting_names,
    usage,
)
from edgeprune.config import COMMANDS, CUSTOM, LESS_MEMORY, TRAINERS, did_you_mean
from edgeprune.errors import ConfigError, JobFailed, UserError
from edgeprune.paths import CONF

FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd",
                    "--config-name", "-cn", "--config-path", "-cp")  # fmt: skip
"""Hydra's flags that may be followed by their value."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape characters that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)  # with a width of 0 nothing would be printed
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print(overview())
        sys.exit(0 if arguments else 2)
    if "--version" in arguments:
        from importlib.metadata import version

        _print(f"edgeprune {version('edgeprune')}")
        sys.exit(0)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f"; choose {', '.join(COMMANDS)}"
        _fail(f"unknown command {command!r}{hint}", 2)
    if "-h" in rest or "--help" in rest:
        _print(command_help(command, rest))
        sys.exit(0)
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current directory is gone; change to one that exists (cd ~)", 1)
    try:
        flags, overrides = _split_flags(rest)
        overrides = _name_custom(command, _name_path(command, overrides))
        _check_names(command, overrides)
        if command != "prune" and _is_sweep(flags, overrides):
            raise ConfigError(f"--multirun is for prune; {command} takes one value per setting")
        _run(command, flags, overrides)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("EDGEPRUNE_TRACEBACK"):
            raise
        _report(command, error)


# ------------------------------------------------------------------------------------- arguments


def _split_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, with their values, and the other arguments."""
    flags, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument.startswith("-"):
            flags.append(argument)
            if argument in FLAGS_WITH_VALUE:
                flags += [value for value in [next(remaining, None)] if value is not None]
        else:
            others.append(argument)
    return flags, others


def _name_path(command: str, arguments: list[str]) -> list[str]:
    """`export RUN sparsity=0.9` -> `export run='RUN' sparsity=0.9`; several paths are a list."""
    name, known = POSITIONAL.get(command), setting_names(command)
    paths = [a for a in arguments if a.split("=")[0].lstrip("+~") not in known
             and ("=" not in a or os.path.exists(a)) and not a.startswith("~")]  # fmt: skip
    if name is None:
        if paths:
            raise ConfigError(f"unexpected argument {paths[0]!r}; settings are name=value")
        return arguments
    is_named = any(a.startswith(f"{name}=") for a in arguments)
    if is_named and not paths:
        return arguments
    if is_named or not paths or (len(paths) > 1 and command not in SEVERAL):
        raise ConfigError(f"got {len(paths)} paths: {usage(command)}")
    value = ",".join(_quote(path) for path in paths)
    value = f"[{value}]" if command in SEVERAL else value
    return [f"{name}={value}", *(a for a in arguments if a not in paths)]


def _quote(text: str) -> str:
    """A string in Hydra's override grammar, where a backslash counts only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def _name_custom(command: str, arguments: list[str]) -> list[str]:
    """A path alone means the user's own model or task: `model.path=X` -> `model=custom ...`.

    Not for commands that begin with a run, whose own model and task the path may belong to.
    """
    names = [argument.split("=")[0].lstrip("+") for argument in arguments]
    groups = ("model",) if command in POSITIONAL else ("model", "task")
    own = [
        f"{group}={CUSTOM}" for group in groups
        if f"{group}.path" in names and not {group, "experiment"} & set(names)
        and group in setting_names(command)
    ]  # fmt: skip
    if command == "evaluate" and "task.path" in names and "task" not in names:
        own.append(f"task={CUSTOM}")
    return own + arguments


def _check_names(command: str, arguments: list[str]) -> None:
    """Refuse unknown settings, which Hydra would accept after a +."""
    known = setting_names(command)
    for argument in arguments:
        key = argument.split("=")[0].lstrip("+~").split("@")[0]
        if key not in known and not key.startswith(("hydra.", "hydra/")) and key != "hydra":
            raise ConfigError(
                f"unknown setting {key!r}{did_you_mean(key, known)} "
                f"(all settings: edgeprune {command} --help)"
            )


def _is_sweep(flags: list[str], overrides: list[str]) -> bool:
    return bool({"-m", "--multirun"} & set(flags)) or "hydra.mode=MULTIRUN" in overrides


# ------------------------------------------------------------------------------------------- run


def register() -> None:
    """Make the settings classes and the default run_dir of conf/prune.yaml known to Hydra."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
    for name, schema in TRAINERS.items():
        store.store(group="trainer", name=name, node=schema)
    for name, function in (
        ("or_any", lambda value: "any" if value is None else value),
        ("title", lambda name, path: os.path.basename(path) if path and name == CUSTOM else name),
    ):
        OmegaConf.register_new_resolver(name, function, replace=True)


def _run(command: str, flags: list[str], overrides: list[str]) -> None:
    """Compose the settings with Hydra and run the command (several times under --multirun).

    All runs of a sweep are checked before the first one starts, if they run in this process.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to standard error
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from edgeprune.commands.console import print_log

    register()
    print_log()
    failures: list[Exception] = []
    run_dirs: set[str] = set()
    only_checks = False

    @hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")
    def job(settings: DictConfig) -> None:
        if any(getattr(failure, "ends_sweep", False) for failure in failures):
            return
        register()  # again, where this runs as a job elsewhere
        try:
            config: Any = OmegaConf.to_object(settings)
            if only_checks:
                _check_apart(config.run_dir, run_dirs)
                return
            getattr(import_module(f"edgeprune.commands.{command}"), command)(config)
        except Exception as error:  # Hydra would print a traceback of its own
            if "SUBMITIT_EXECUTOR" in os.environ:  # Hydra passes it on to the launching process
                raise JobFailed(str(error)) from None
            failures.append(error)

    sys.argv = [f"edgeprune {command}", *overrides, *flags]  # overrides must precede flags
    runs_here = not any(a.startswith(("hydra/", "launcher=")) for a in overrides)
    if _is_sweep(flags, overrides) and runs_here:
        only_checks = True
        job()
        only_checks = False
    if not failures:
        job()
    for failure in failures[:-1]:  # of a sweep
        print(f"edgeprune: {failure}", file=sys.stderr)
    if failures:
        raise failures[-1]


def _check_apart(run_dir: str, earlier: set[str]) -> None:
    """Raise ConfigError if an earlier run of the sweep has this run directory."""
    if run_dir in earlier:
        raise ConfigError(
            f"several runs of this sweep go to {run_dir}; name in run_dir what they differ in, "
            "such as run_dir='runs/${ablation.kind}-${seed}'"
        )
    earlier.add(run_dir)


# ---------------------------------------------------------------------------------------- errors


def _report(command: str, error: Exception) -> NoReturn:
    """Report what went wrong in one message, and exit."""
    if isinstance(error, UserError):
        if _rank() > 0 and error.on_every_rank:
            sys.exit(error.exit_code)  # rank 0 reports it
        _fail(str(error), error.exit_code)
    if _is_from(error, "hydra.", "omegaconf."):
        if _rank() > 0:
            sys.exit(2)
        _fail(_explain_hydra(command, error), 2)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        _fail(f"out of memory ({str(error).strip().splitlines()[0]}). {LESS_MEMORY}", 1)
    if isinstance(error, ValueError) and _is_from(error, "edgeprune."):
        _fail(str(error), 1)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if not where and _output_fails():
            where = "standard output: "
        _fail(f"{where}{error.strerror or error}", 1)
    _fail(
        f"unexpected {type(error).__name__}: {error} (this is a bug; EDGEPRUNE_TRACEBACK=1 shows "
        "where)", 1,
    )  # fmt: skip


def _is_from(error: Exception, *packages: str) -> bool:
    """Whether a package defines the error's class, or raised it as a ValueError."""
    if type(error).__module__.startswith(packages):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    where = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return isinstance(error, (ValueError, AssertionError)) and where.startswith(packages)


def _explain_hydra(command: str, error: Exception) -> str:
    """An error of Hydra or OmegaConf in one line, with the nearest valid setting."""
    text = str(error)
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        if missing[1] == "hydra/launcher/submitit_slurm":
            return "launcher=slurm needs a package; pip install 'edgeprune[slurm]'"
        group, _, choice = missing[1].partition("/")
        if group in GROUPS:
            own = f"; {group}=custom {group}.path=... takes your own"
            own = own if group in ("model", "task") else ""
            return f"unknown {group} {choice!r}; choose {', '.join(choices_of(group))}{own}"
    if "Unexpected type for root" in text or "NoneType" in text:
        return f"a part of a group was set that is null here; give the group as well ({text})"
    argument = getattr(error, "override", None)
    if argument is not None:
        return (
            f"{argument!r} cannot be parsed; text with special characters needs quotes inside the "
            "shell's, as in run_dir=\"'a (1), b'\" (Hydra's override grammar)"
        )
    lines = [line.strip() for line in str(error.__cause__ or text).splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith("object_type")]
    return f"{'; '.join(wanted)} (all settings: edgeprune {command} --help)"


def _rank() -> int:
    """Rank of this process in its run; 0 when there is one."""
    return int(os.environ.get("RANK", "0"))


def _fail(message: str, code: int) -> NoReturn:
    who = f" (process {_rank()})" if _rank() > 0 else ""
    print(f"edgeprune{who}: {message}", file=sys.stderr)
    sys.exit(code)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        _output_fails()
    except OSError as error:
        _output_fails()
        _fail(f"standard output: {error.strerror}", 1)


def _output_fails() -> bool:
    """Whether the rest of the output cannot be printed; it is dropped then."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    main()
