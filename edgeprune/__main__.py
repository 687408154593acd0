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

from edgeprune.config import (
    COMMANDS,
    CUSTOM,
    LESS_MEMORY,
    check_run,
    did_you_mean,
    model_title,
    task_title,
)
from edgeprune.errors import ConfigError, JobFailed, UserError
from edgeprune.help import (
    GROUPS,
    POSITIONAL,
    SEVERAL,
    choices_of,
    command_help,
    overview,
    setting_kinds,
    setting_names,
    usage,
)
from edgeprune.paths import CONF

FLAGS = ("-m", "--multirun", "--cfg", "--resolve", "--package", "--info", "--config-dir")
"""Of Hydra's that are of use here."""
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
"""Text that is quoted as Hydra has it."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what its encoding lacks is written as a number
            stream.reconfigure(errors="backslashreplace")
    if not os.environ.get("COLUMNS", "").strip("0"):
        os.environ.pop("COLUMNS", None)  # with a width of 0 nothing would be printed
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _tell(overview())
        sys.exit(0 if arguments else 2)
    if "--version" in arguments:
        from importlib.metadata import version

        _tell(f"edgeprune {version('edgeprune')}")
        sys.exit(0)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f"; choose {', '.join(COMMANDS)}"
        _fail(f"unknown command {command!r}{hint}", 2)
    if "-h" in rest or "--help" in rest:
        _tell(command_help(command))
        sys.exit(0)
    try:
        os.getcwd()
    except FileNotFoundError:
        _fail("the current directory is gone; change to one that is there (cd ~)", 1)
    rest = _as_text(command, _name_own(command, _name_path(command, rest)))
    _check_names(command, rest)
    if command != "prune" and _is_sweep(rest):
        _fail(f"a sweep (--multirun) is of prune; {command} takes one value of each setting", 2)
    try:
        _run(command, rest)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("EDGEPRUNE_TRACEBACK"):
            raise
        _report(command, rest, error)


def _tell(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        _output_fails()
    except OSError as error:
        _output_fails()
        _fail(f"standard output: {error.strerror}", 1)


def _output_fails() -> bool:
    """Whether what is yet to be printed cannot be; then it is dropped."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _name_path(command: str, arguments: list[str]) -> list[str]:
    """`export RUN sparsity=0.9` -> `export run='RUN' sparsity=0.9`; several paths are a list."""
    name = POSITIONAL.get(command)
    bare = [a for a in arguments if "=" not in a and not a.startswith(("-", "~", "+"))]
    if name is None:
        if bare:
            _fail(f"unexpected argument {bare[0]!r}; settings are written name=value", 2)
        return arguments
    given = any(a.startswith(f"{name}=") for a in arguments)
    if given and not bare:
        return arguments
    known = setting_names(command)
    bare = [
        a for a in arguments  # a path may have a = in it
        if a in bare or ("=" in a and a.split("=")[0] not in known and os.path.exists(a))
    ]  # fmt: skip
    if command in SEVERAL:
        if not bare or given:
            _fail(f"give paths: {usage(command)}", 2)
        value = "[" + ",".join(_quote(path) for path in bare) + "]"
    else:
        if len(bare) != 1 or given:
            _fail(f"give one path: {usage(command)}", 2)
        value = _quote(bare[0])
    return [f"{name}={value}", *(a for a in arguments if a not in bare)]


def _name_own(command: str, arguments: list[str]) -> list[str]:
    """A path alone is of a model or task of one's own: `model.path=X` -> `model=custom ...`.

    Not of commands that begin with a run, whose model and task these may be.
    """
    if command in POSITIONAL:
        return arguments
    names = [argument.split("=")[0].lstrip("+") for argument in arguments]
    own = [
        f"{group}={CUSTOM}"
        for group in ("model", "task")
        if f"{group}.path" in names and not {group, "experiment"} & set(names)
    ]
    return own + arguments


def _check_names(command: str, arguments: list[str]) -> None:
    """Exit where a setting is unknown: with a + before its name Hydra would take any."""
    known = setting_names(command)
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("-"):
            if name not in FLAGS:
                _fail(f"unknown flag {name!r}{did_you_mean(name, FLAGS)}", 2)
            continue
        key = name.lstrip("+~").split("@")[0]
        is_hydras = key == "hydra" or key.startswith(("hydra.", "hydra/"))
        if "=" in argument and key not in known and not is_hydras:
            _fail(
                f"unknown setting {key!r}{did_you_mean(key, known)} "
                f"(all settings: edgeprune {command} --help)",
                2,
            )
        if key in GROUPS and argument.endswith("=null"):
            _fail(f"{argument}: choose {', '.join(choices_of(key))}, or leave it out", 2)


def _as_text(command: str, arguments: list[str]) -> list[str]:
    """Text quoted, so that Hydra's grammar reads none of it, and lists in their brackets.

    In a sweep values stay as they are, since commas part them.
    """
    kinds, is_sweep = setting_kinds(command), _is_sweep(arguments)
    return [_one_as_text(kinds, argument, is_sweep) for argument in arguments]


def _is_sweep(arguments: list[str]) -> bool:
    return any(a in ("-m", "--multirun", "hydra.mode=MULTIRUN") for a in arguments)


def _one_as_text(kinds: dict[str, Any], argument: str, is_sweep: bool) -> str:
    name, is_given, value = argument.partition("=")
    kind = kinds.get(name.lstrip("+"))
    if not is_given or kind not in (str, list[str]) or value == "null" or "${" in value:
        return argument
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    if not is_sweep and kind is str and not QUOTED.fullmatch(value):
        value = _quote(value)
    elif not is_sweep and kind is not str and not value.startswith("["):
        value = f"[{value}]"
    return f"{name}={value}"


def _quote(text: str) -> str:
    """A string in Hydra's override grammar, where a backslash counts only before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def add_resolvers() -> None:
    """What the default run_dir in conf/prune.yaml is made with."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver(
        "or_any", lambda value: "any" if value is None else value, replace=True
    )
    OmegaConf.register_new_resolver("task_title", task_title, replace=True)
    OmegaConf.register_new_resolver("model_title", model_title, replace=True)


def _run(command: str, overrides: list[str]) -> None:
    """Compose the settings with Hydra and run the command (several times under --multirun).

    All runs of a sweep are checked before the first, where they are run here.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us, not to standard error
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import DictConfig, OmegaConf

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)

    add_resolvers()
    failures: list[Exception] = []
    run_dirs: set[str] = set()
    only_checks = False

    @hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")
    def job(settings: DictConfig) -> None:
        if any(isinstance(f, UserError) and f.exit_code is not None for f in failures):
            return  # a signal stops the whole sweep
        add_resolvers()  # again, where this runs as a job elsewhere
        try:
            config: Any = OmegaConf.to_object(settings)
            if only_checks:
                check_run(config)
                _check_apart(config.run_dir, run_dirs)
                return
            getattr(import_module(f"edgeprune.commands.{command}"), command)(config)
        except Exception as error:  # Hydra would print a traceback of its own
            if "SUBMITIT_EXECUTOR" in os.environ:  # in a job; Hydra brings it to who started that
                raise JobFailed(str(error)) from None
            failures.append(error)

    flags_last = sorted(overrides, key=lambda argument: argument.startswith("-"))
    sys.argv = [f"edgeprune {command}", *flags_last]  # Hydra takes no overrides after a flag
    if _is_sweep(overrides) and not any(a.startswith(("hydra/", "launcher=")) for a in overrides):
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
    """Raises ConfigError where an earlier run of the sweep has this run directory."""
    if run_dir in earlier:
        raise ConfigError(
            f"another run of this sweep goes to {run_dir}, too; have run_dir name what they "
            "differ in, such as run_dir='runs/${ablation.kind}-${seed}'"
        )
    earlier.add(run_dir)


# ---------------------------------------------------------------------------------------- errors


def _report(command: str, arguments: list[str], error: Exception) -> NoReturn:
    """Say what went wrong in one message, and exit."""
    name = type(error).__name__
    stop = error if isinstance(error, UserError) else UserError()
    if _rank() > 0 and (stop.on_every_process or _of_hydra(error)):
        sys.exit(stop.exit_code or 1)  # the first process says it
    if stop.exit_code is not None:
        _fail(str(error), stop.exit_code)
    if _of_hydra(error):
        _fail(_explain_hydra(command, error), 2)
    if isinstance(error, ConfigError):
        _fail(str(error), 2)
    if isinstance(error, AssertionError) and "Unexpected type for root" in str(error):
        _fail(_explain_part(arguments), 2)  # a setting of a group that is null
    if name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        _fail(f"out of memory ({str(error).strip().splitlines()[0]}). {LESS_MEMORY}", 1)
    if isinstance(error, (ValueError, RuntimeError)) and _ours(error):
        _fail(str(error), 1)
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        if not what and _output_fails():
            what = "standard output: "
        _fail(f"{what}{error.strerror or error}", 1)
    _fail(f"unexpected {name}: {error} (this is a defect; EDGEPRUNE_TRACEBACK=1 shows where)", 1)


def _rank() -> int:
    """Which of the run's processes this is; 0 when there is one."""
    return int(os.environ.get("RANK", "0"))


def _of_hydra(error: Exception) -> bool:
    return _is_from(error, "hydra.", "omegaconf.")


def _ours(error: Exception) -> bool:
    return _is_from(error, "edgeprune.")


def _is_from(error: Exception, *packages: str) -> bool:
    """Errors meant for people: a package's own classes, and ValueErrors that its code raises."""
    if type(error).__module__.startswith(packages):
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    where = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return isinstance(error, ValueError) and where.startswith(packages)


def _explain_hydra(command: str, error: Exception) -> str:
    """Hydra's and OmegaConf's errors in one line, with the nearest right setting."""
    text = str(error)
    cause = error.__cause__
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        if missing[1] == "hydra/launcher/submitit_slurm":
            return "launcher=slurm needs a package; pip install 'edgeprune[slurm]'"
        group, _, choice = missing[1].partition("/")
        if group in GROUPS:
            has_own = group in ("model", "task")
            own = f"; {group}=custom {group}.path=... takes your own" if has_own else ""
            return f"no {group} {choice!r}; choose {', '.join(choices_of(group))}{own}"
    argument = getattr(error, "override", None)
    if argument is not None:
        return (
            f"{argument!r} cannot be read: values of a sweep have one comma between them, "
            "${...} needs both braces, and text with special characters goes in quotes within the "
            "shell's, as in run_dir=\"'a (1), b'\""
        )
    lines = [line.strip() for line in (str(cause) if cause else text).splitlines() if line.strip()]
    wanted = [line for line in lines if not line.startswith("object_type")]
    return f"{'; '.join(wanted)} (all settings: edgeprune {command} --help)"


def _explain_part(arguments: list[str]) -> str:
    names = [argument.split("=")[0].lstrip("+") for argument in arguments]
    pairs = [(name, name.split(".")[0]) for name in names if "." in name]
    part, group = next(pair for pair in pairs if pair[1] in GROUPS and pair[1] not in names)
    return (
        f"{part}=... sets a part of {group}, which is the run's own here; give {group}=NAME as well"
    )


def _fail(message: str, code: int) -> NoReturn:
    who = f" (process {_rank()})" if _rank() > 0 else ""
    print(f"edgeprune{who}: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
