"""The command line: `edgeprune <command> [settings]`.

Settings are Hydra overrides (`trainer.steps=500`). Nothing heavy is imported before a command runs,
so that help is instant.
"""

import os
import re
import sys
from importlib import import_module
from importlib.metadata import version
from traceback import walk_tb
from typing import Any, NoReturn

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
from edgeprune.paths import CONF

FLAGS_WITH_VALUE = ("--cfg", "-c", "--info", "-i", "--package", "-p", "--config-dir", "-cd",
                    "--config-name", "-cn", "--config-path", "-cp")  # fmt: skip
"""Hydra's flags that may be followed by their value."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not os.environ.get("COLUMNS", "").strip("0"):  # a width of 0 would print nothing
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape characters that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
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
        _run(command, *_split_flags(rest))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:  # `| head` has read enough
        _drop_output()
        sys.exit(0)
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
        if not argument.startswith("-"):
            others.append(argument)
            continue
        flags.append(argument)
        if argument in FLAGS_WITH_VALUE:
            flags += [value for value in [next(remaining, None)] if value is not None]
    return flags, others


def _complete(command: str, arguments: list[str]) -> list[str]:
    """Hydra overrides from the arguments: paths get their name, `custom` is chosen for own files.

    `export RUN sparsity=0.9` -> `export run='RUN' sparsity=0.9`; several paths become a list.
    `prune model.path=X` -> `prune model=custom model.path=X`. Raises ConfigError for an unknown
    setting, which Hydra would accept after a +, or the wrong number of paths.
    """
    known, name = help.setting_names(command), help.POSITIONAL.get(command)
    keys = {argument: re.split("[=@]", argument.lstrip("+~"))[0] for argument in arguments}
    bare = {a for a in arguments if "=" not in a and a[:1] not in ("~", "+")}
    paths = [a for a in arguments if a in bare or (keys[a] not in known and os.path.exists(a))]
    others = [argument for argument in arguments if argument not in paths]
    for argument in others:
        if keys[argument] not in known and not re.match("hydra[./=]", argument.lstrip("+~")):
            hint = f"{did_you_mean(keys[argument], known)} (see edgeprune {command} --help)"
            raise ConfigError(f"unknown setting {keys[argument]!r}{hint}")
    is_given = name in keys.values()
    is_right = len(paths) == 1 or (paths and command in help.SEVERAL)
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
    return custom + others


def _quote(text: str) -> str:
    """A string in Hydra's override grammar, where a backslash counts only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


# ------------------------------------------------------------------------------------------- run


def register() -> None:
    """Make the settings classes and the default run_dir of conf/prune.yaml known to Hydra."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
    for name, schema in TRAINERS.items():
        store.store(group="trainer", name=f"{name}_schema", node=schema)
    resolvers = {
        "title": lambda name, path: os.path.basename(path) if path and name == CUSTOM else name,
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def _run(command: str, flags: list[str], arguments: list[str]) -> None:
    """Compose the settings with Hydra and run the command (several times under --multirun).

    All runs of a sweep are checked before the first one starts, if they run in this process.
    """
    overrides = _complete(command, arguments)
    is_sweep = bool({"-m", "--multirun"} & set(flags)) or "hydra.mode=MULTIRUN" in overrides
    if command not in RUN_COMMANDS and is_sweep:
        raise ConfigError(
            f"--multirun is for {' and '.join(RUN_COMMANDS)}; {command} takes one value per setting"
        )
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to standard error
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from edgeprune.commands.console import print_log

    register()
    failures: list[Exception] = []
    run_dirs: set[str] = set()
    only_checks = False

    @hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")
    def job(settings: DictConfig) -> None:
        if any(getattr(failure, "ends_sweep", False) for failure in failures):
            return
        register()  # again, where this runs as a job elsewhere
        print_log()  # Hydra has disabled all loggers
        try:
            config: Any = OmegaConf.to_object(settings)
            if not only_checks:
                getattr(import_module(f"edgeprune.commands.{command}"), command)(config)
            elif config.run_dir in run_dirs:
                raise ConfigError(
                    f"several runs of this sweep go to {config.run_dir}; name in run_dir what they "
                    "differ in, such as run_dir='runs/${ablation.kind}-${seed}'"
                )
            else:
                run_dirs.add(config.run_dir)
        except Exception as error:  # Hydra would print a traceback of its own
            if "SUBMITIT_EXECUTOR" in os.environ:  # Hydra passes it on to the launching process
                raise JobFailed(str(error)) from None
            failures.append(error)

    sys.argv = [f"edgeprune {command}", *overrides, *flags]  # overrides must precede flags
    if is_sweep and not any(a.startswith(("hydra/", "launcher=")) for a in overrides):
        only_checks = True
        job()
        only_checks = False
    if not failures:
        job()
    for failure in failures[:-1]:  # of a sweep
        print(f"edgeprune: {failure}", file=sys.stderr)
    if failures:
        raise failures[-1]


# ---------------------------------------------------------------------------------------- errors


def _report(command: str, error: Exception) -> NoReturn:
    """Report what went wrong in one message, and exit."""
    if isinstance(error, UserError):
        _fail(str(error), error.exit_code, on_every_rank=error.on_every_rank)
    if _is_from(error, "hydra.", "omegaconf."):
        _fail(_explain_hydra(command, error), 2, on_every_rank=True)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        _fail(f"out of memory ({str(error).strip().splitlines()[0]}). {LESS_MEMORY}", 1)
    if _is_from(error, "edgeprune."):
        _fail(str(error), 1)
    if isinstance(error, OSError):
        if error.filename is None:
            _drop_output()
        _fail(f"{error.filename or 'cannot write'}: {error.strerror or error}", 1)
    _fail(f"unexpected {type(error).__name__}: {error} (this is a bug; EDGEPRUNE_TRACEBACK=1 shows "
          "where)", 1)  # fmt: skip


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
        return "a part of the run's model or task cannot change alone; give model= or task= as well"
    if hasattr(error, "override"):
        return (
            f"{error.override!r} cannot be parsed; text with special characters needs quotes "
            "inside the shell's, as in run_dir=\"'a (1), b'\" (Hydra's override grammar)"
        )
    lines = [line.strip() for line in str(error.__cause__ or text).splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith("object_type")]
    return f"{'; '.join(wanted)} (all settings: edgeprune {command} --help)"


def _fail(message: str, code: int, *, on_every_rank: bool = False) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not on_every_rank:
        print(f"edgeprune{f' (process {rank})' if rank else ''}: {message}", file=sys.stderr)
    sys.exit(code)


def _drop_output() -> None:
    """Discard what cannot be printed, so that exiting does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
