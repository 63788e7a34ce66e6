"""The `shardwright` command: compose a run, check it, start its ranks, tell what came of it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from launchers import (
    cancel,
    checkpoints,
    commands,
    completion,
    compose_errors,
    doctor,
    health,
    job_script,
    logs,
    machine,
    preflight,
    push,
    recover,
    report,
    resume,
    start,
    status,
    submit,
)
from launchers.machine import Machine
from train import config as run_config
from train import stop
from train.config import RunConfig, from_tree, to_yaml
from train.errors import BAD_INPUT, FAILED, RESUMABLE, UserError
from train.owner import owned

CONF = Path(__file__).resolve().parent.parent / "conf"

COMMANDS = (
    *("train", "resume", "join", "sample", "checkpoints", "recover", "push"),
    *("status", "logs", "cancel", "doctor"),
)

USAGE = """\
Pretrain masked and causal language models, from a laptop's CPU to many GPUs.

  shardwright train [--dry-run] [group=option] [key=value]
      compose a run, check it and start it; --help lists groups, options and flags,
      --dry-run shows config, engine settings and command, and starts nothing
  shardwright resume RUN_DIR [--dry-run] [group=option] [key=value]
      go on from the newest whole checkpoint, with other ranks, strategy, precision or
      more steps if asked
  shardwright join RUN_DIR [--node-rank N]
      on each other node of a run over several: start its ranks there
  shardwright sample RUN_DIR --prompt TEXT
      fill masks or continue a text with a trained model; --strategy zero3 or fsdp divides it
      among ranks (--nproc-per-node N) where it does not fit one device
  shardwright checkpoints RUN_DIR [--verify]
      list what a run has saved and whether it is whole; --verify checks every hash
  shardwright recover CHECKPOINT_OR_RUN OUT [--dtype bf16] [--step N] [--dry-run]
      make a Hugging Face model directory of whole weights out of any sharded checkpoint, in
      bounded memory; --help lists more flags
  shardwright push DIR REPO [--public] [--dry-run]
      upload a model directory with its card to a hub, private unless asked otherwise
  shardwright status RUN_DIR|all
      state in the queue, step, loss, tokens per second, time left, newest checkpoint
  shardwright logs RUN_DIR [--rank N] [--follow]
      what a run's job or one of its ranks prints
  shardwright cancel RUN_DIR [--now]
      stop a run after a checkpoint, wherever it runs; --now: at once
  shardwright doctor [group=option] [key=value]
      look for what stops or slows training here; with launcher=... on all of its nodes,
      with measured collectives and matrix products
  shardwright --version

Examples
  shardwright train experiment=demo
  shardwright train model=gpt2_small strategy=zero2 precision=bf16 trainer.max_steps=2000
  shardwright train launcher=slurm launcher.nodes=2 launcher.gpus_per_node=8 model=llama_1b
  shardwright sample runs/demo-20260131-120000 --prompt 'def __init__(self'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(report.error_text(str(error)), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `shardwright train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    match arguments:
        case []:
            print(USAGE, end="", file=sys.stderr)
            return BAD_INPUT
        case ["-h" | "--help" | "help", *_]:
            print(USAGE, end="")
            return 0
        case ["--version" | "-V"]:
            print(f"shardwright {_version()}")
            return 0
        case ["-sc" | "--shell-completion" | "--shell_completion", *_]:
            return _complete(arguments)
        case ["train", *rest]:
            return _train(rest)
        case ["resume", *rest]:
            return _resume(rest)
        case ["join", *rest]:
            return _join(rest)
        case ["sample", *rest]:
            return _sample(rest)
        case ["checkpoints", *rest]:
            return checkpoints.main(rest)
        case ["recover", *rest]:
            return recover.main(rest)
        case ["push", *rest]:
            return push.main(rest)
        case ["status", *rest]:
            return status.main(rest)
        case ["logs", *rest]:
            return logs.main(rest)
        case ["cancel", *rest]:
            return cancel.main(rest)
        case ["doctor", *rest]:
            return _doctor(rest)
    command = arguments[0]
    if "=" in command:
        raise UserError(f"{command} comes behind a command: shardwright train {command}")
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.4)
    there_are = f"there are {', '.join(COMMANDS[:-1])} and {COMMANDS[-1]}"
    hint = f"did you mean {near[0]}?" if near else there_are
    raise UserError(f"unknown command {command}: {hint}")


# --- train --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One composed run, before it is checked."""

    tree: DictConfig
    choices: Mapping[str, str]
    """Option chosen of each group."""
    number: int | None
    """Place in a multirun; None in a single run."""


def _train(arguments: list[str]) -> int:
    dry_run = "--dry-run" in arguments
    jobs = compose([argument for argument in arguments if argument != "--dry-run"])
    here = machine.detect(os.environ)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    configs = [_resolved(job, here, stamp) for job in jobs]
    if "slurm" in (kinds := {config.launcher.kind for config in configs}):
        if len(kinds) > 1:
            raise UserError(
                f"launcher={','.join(sorted(kinds))}: the runs of a sweep start here or by SLURM, "
                "not both; choose one launcher"
            )
        return _train_by_slurm(configs, [job.choices for job in jobs], here, dry_run=dry_run)
    if dry_run:
        for config in configs:
            _show(config, here)
    for config in configs:
        preflight.check(config, here)
    if dry_run:
        return 0
    worst = 0
    for job, config in zip(jobs, configs, strict=True):
        code = launch(config, job.choices, here)
        if code == RESUMABLE or code > 128:  # told to stop: the rest of a sweep does not start
            return code
        worst = worst or code
    return worst


def _train_by_slurm(
    configs: list[RunConfig], choices: list[Mapping[str, str]], here: Machine, *, dry_run: bool
) -> int:
    if dry_run:
        print("\n".join(_shown(config) for config in configs))
        print(submit.show(configs), flush=True)
    for config in configs:
        preflight.check(config, here)
    return 0 if dry_run else submit.new_runs(configs, choices, here)


def compose(arguments: list[str]) -> list[Job]:
    """Return the runs that the arguments ask for; none where they ask Hydra itself for something.

    Raises UserError on whatever does not compose.
    """
    jobs: list[Job] = []

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def collect(tree: DictConfig) -> None:
        settings = HydraConfig.get()
        number = settings.job.num if settings.mode == RunMode.MULTIRUN else None
        choices = {str(k): str(v) for k, v in settings.runtime.choices.items()}
        jobs.append(Job(tree, choices, number))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_hydra_process())
        parsed, unknown = get_args_parser().parse_known_intermixed_args(arguments)
        if flags := [argument for argument in unknown if argument.startswith("-")]:
            raise UserError(compose_errors.unknown_flag_message(flags[0]))
        starts_runs = not (
            parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
        )
        # Hydra's own parser takes no flag between overrides.
        sys.argv += [argument for argument in arguments if argument not in parsed.overrides]
        sys.argv += [compose_errors.qualify(override) for override in parsed.overrides]
        if starts_runs:
            # Hydra's sweeper writes a multirun.yaml of its own, wherever this points.
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            sys.argv.append(f"hydra.sweep.dir={_quoted(scratch)}")
        try:
            if starts_runs:
                groups = {directory.name for directory in CONF.iterdir() if directory.is_dir()}
                compose_errors.check_options(parsed.overrides, groups)
            collect()
        except UserError:
            raise
        except compose_errors.USER_CAUSED as error:
            raise UserError(compose_errors.explain(error)) from error
        except SystemExit as end:
            if end.code not in (None, 0):
                raise SystemExit(BAD_INPUT) from None
            if starts_runs:
                raise
    return jobs


def launch(config: RunConfig, choices: Mapping[str, str], here: Machine) -> int:
    """Create the run directory, prepare the data, run the ranks; return the exit code."""
    assert config.run_dir is not None, "resolved"
    run_dir = Path(config.run_dir)
    environment = commands.rank_environment(config, here, os.environ)

    made = preflight.create(config, run_dir)
    print(report.header(config, choices, here, environment), flush=True)
    try:
        prepared = _prepare(config)
    except BaseException:
        preflight.take_back(made)
        raise
    if prepared == BAD_INPUT:
        preflight.take_back(made)
    if prepared != 0:
        return prepared
    print(report.other_nodes(config), end="", flush=True)
    return _run_ranks(config, here)


def _prepare(config: RunConfig) -> int:
    """Make the tokenizer and tokens of a run directory where they are not yet there.

    Returns the exit code, and has said what went wrong where it is not 0.
    """
    run_dir = Path(str(config.run_dir))
    ended = start.run(
        commands.prepare_command(run_dir),
        commands.package_environment(os.environ),
        grace_seconds=config.launcher.grace_seconds,
    )
    if ended.stopped_by is not None:
        print(report.stopped_early(run_dir, ended.stopped_by), file=sys.stderr)
        return RESUMABLE
    if ended.code in (0, BAD_INPUT):
        return ended.code
    print(f"preparing the data failed; {run_dir} is kept", file=sys.stderr)
    return FAILED


def _run_ranks(config: RunConfig, here: Machine, node_rank: int = 0) -> int:
    """Start this node's ranks of a run directory and wait; return the exit code."""
    run_dir = Path(str(config.run_dir))
    environment = commands.rank_environment(config, here, os.environ)
    for name, text in commands.launcher_files(config, environment, here).items():
        (run_dir / name).write_text(text, encoding="utf-8")
    # Launchers write their own pages about a failed rank to stderr, the ranks the terminal's lines
    # to stdout.
    name = f"torchrun-{node_rank}.log" if node_rank else report.TORCHRUN_LOG
    quiet = run_dir / "logs" / name if config.launcher.kind != "local" else None
    if node_rank == 0:
        stop.forget(run_dir)
    ended = start.run(
        commands.rank_command(config, run_dir, machine=here, node_rank=node_rank),
        environment,
        stderr_file=quiet,
        grace_seconds=config.launcher.grace_seconds,
        run_dir_elsewhere=run_dir if getattr(config.launcher, "hostfile", None) else None,
    )
    if where := stop.read(run_dir):
        print(report.stopped(where, run_dir, ended.stopped_by), file=sys.stderr)
        return RESUMABLE
    if ended.code == 0:
        print(report.finish(run_dir))
        return 0
    failures = report.rank_failures(run_dir)
    print(report.failure(ended.code, failures, run_dir, ended.stopped_by), file=sys.stderr)
    return report.exit_code(ended.code, failures, ended.stopped_by)


def _resolved(job: Job, here: Machine, stamp: str) -> RunConfig:
    """Return a job's config, valid and with nothing left open."""
    config = from_tree(plain(job.tree))
    return machine.resolve(config, here, _run_dir(config, job.number, stamp))


def plain(tree: DictConfig) -> Any:
    """Return a composed tree as plain values, nothing left to interpolate."""
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except compose_errors.USER_CAUSED as error:
        raise UserError(compose_errors.explain(error)) from error


def _run_dir(config: RunConfig, number: int | None, stamp: str) -> str:
    """Return the absolute run directory of a job; ``number`` is its place in a multirun."""
    if number is None:
        if config.sweep_dir is not None:
            raise UserError(
                f"sweep_dir={config.sweep_dir} is for several runs; add -m, or give run_dir"
            )
        return os.path.abspath(config.run_dir or Path("runs") / f"{config.name}-{stamp}")
    if config.run_dir is not None:
        raise UserError(
            f"run_dir={config.run_dir} is one directory, and -m starts several runs; "
            "give sweep_dir instead"
        )
    sweep_dir = Path(config.sweep_dir or Path("sweeps") / f"{config.name}-{stamp}")
    return os.path.abspath(sweep_dir / str(number))


def _shown(config: RunConfig) -> str:
    """Return a run's config and its engine settings, as `--dry-run` prints them."""
    from train.strategy import engine_settings

    settings = json.dumps(engine_settings(config), indent=2)
    return f"# {config.run_dir}/config.yaml\n{to_yaml(config)}\n# engine settings\n{settings}\n"


def _show(config: RunConfig, here: Machine) -> None:
    """Print what a run would be, as `--dry-run` does."""
    assert config.run_dir is not None, "resolved"
    print(_shown(config))
    if config.launcher.kind == "slurm":
        print(submit.show([config]), flush=True)
        return
    environment = commands.rank_environment(config, here, os.environ)
    argv = commands.rank_command(config, Path(config.run_dir), machine=here)
    for name, text in commands.launcher_files(config, environment, here).items():
        print(f"# {config.run_dir}/{name}\n{text}")
    print("# environment")
    print("\n".join(f"{name}={shlex.quote(value)}" for name, value in environment.items()))
    print(f"\n# command\n{shlex.join(argv)}", flush=True)


@contextlib.contextmanager
def _hydra_process() -> Iterator[None]:
    """Have Hydra know the program by its name, and raise its errors instead of printing them."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["shardwright"]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _quoted(text: str) -> str:
    """Return a string literal of Hydra's override grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- resume ------------------------------------------------------------------------------------


def _resume(arguments: list[str]) -> int:
    """Go on in a run directory from its newest whole checkpoint."""
    dry_run = "--dry-run" in arguments
    match [argument for argument in arguments if argument != "--dry-run"]:
        case [path, *overrides] if "=" not in path and not path.startswith("-"):
            run_dir = Path(os.path.abspath(path))
        case _:
            raise UserError(
                "resume needs the run's directory first: shardwright resume RUN_DIR [key=value]"
            )
    before = run_config.load(run_dir)
    submit.check_no_job(run_dir)
    groups = {name for name in RunConfig.model_fields if (CONF / name).is_dir()}
    options: dict[str, Any] = {}
    if picked := resume.chosen(overrides, groups):
        (job,) = compose(picked)
        for group in (choice.partition("=")[0] for choice in picked):
            options[group] = OmegaConf.to_container(job.tree[group], resolve=True)
    here = machine.detect(os.environ)
    config = machine.resolve(resume.changed(before, overrides, options), here, str(run_dir))
    if dry_run:
        _show(config, here)
    preflight.check_machine(config, here)
    if dry_run:
        return 0

    with owned(run_dir, lambda text: print(text, flush=True)):
        newest = resume.write(run_dir, config, overrides)
    choices = dict(choice.split("=", 1) for choice in picked)
    where = newest.name if newest else "the beginning: there is no checkpoint yet"
    if config.launcher.kind == "slurm":
        print(f"goes on from {where}")
        try:
            return submit.again(config, choices, here)
        except UserError:
            resume.take_back(run_dir)
            raise
    environment = commands.rank_environment(config, here, os.environ)
    print(report.header(config, choices, here, environment))
    print(f"  {'goes on':<10}from {where}", flush=True)
    print(report.other_nodes(config), end="", flush=True)
    if not (run_dir / "data.json").exists():  # stopped while they were being prepared
        prepared = _prepare(config)
        if prepared != 0:
            return prepared
    return _run_ranks(config, here)


# --- join ---------------------------------------------------------------------------------------


def _join(arguments: list[str]) -> int:
    """Start this node's ranks of a run that another node has begun."""
    parser = argparse.ArgumentParser(
        prog="shardwright join",
        description="Start this node's ranks of a run over several nodes. Its directory lies on a "
        "file system that all of them share; `shardwright train` on the first node made it.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--node-rank", type=int, metavar="N", help="with rendezvous=static")
    options = parser.parse_args(arguments)
    run_dir = Path(os.path.abspath(options.run_dir))
    config = run_config.load(run_dir)
    node_rank = preflight.node_rank(config, options.node_rank)
    here = machine.detect(os.environ)
    preflight.check_machine(config, here)
    # Found where the nodes share the cache.
    return _prepare(config) or _run_ranks(config, here, node_rank)


# --- the other commands -------------------------------------------------------------------------


def _sample(arguments: list[str]) -> int:
    from train import sample

    options = sample.parser().parse_args(arguments)
    sample.check_strategy(options.strategy, options.nproc_per_node)
    if options.strategy is not None:
        return _sample_together(options, arguments)
    argv = [sys.executable, "-m", "train.sample", *arguments]
    start.replace(argv, commands.package_environment(os.environ))
    return FAILED  # not reached: this process is train.sample now


def _sample_together(options: argparse.Namespace, arguments: list[str]) -> int:
    """Start ranks that hold the model together; return the exit code."""
    from train import sample

    here = machine.detect(os.environ)
    model_dir = sample.model_directory(options.run_dir).absolute()
    ranks = options.nproc_per_node or max(1, here.gpus)
    (job,) = compose(sampling_overrides(model_dir, options.strategy, ranks))
    with contextlib.ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="shardwright-sample-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        config = machine.resolve(from_tree(plain(job.tree)), here, str(directory))
        if problems := machine.lacking(config.launcher.device, ranks, config.precision, here):
            raise UserError("\n".join(problems))
        (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (directory / "logs").mkdir()
        ended = start.run(
            commands.rank_command(
                config, directory, module="train.sharded_sample", arguments=arguments
            ),
            commands.rank_environment(config, here, os.environ),
            stderr_file=directory / "logs" / report.TORCHRUN_LOG,
            grace_seconds=0,  # they have nothing to save
        )
        failures = report.rank_failures(directory)
        code = report.exit_code(ended.code, failures, ended.stopped_by)
        if code == BAD_INPUT and failures:
            raise UserError(failures[0].message)
        if code != 0:
            stack.pop_all()  # the message names the logs
            text = report.failure(ended.code, failures, directory, ended.stopped_by)
            print(text, file=sys.stderr)
        return code


def sampling_overrides(model_dir: Path, strategy: str, ranks: int) -> list[str]:
    """Return the overrides of a run that loads a model under a strategy, in the model's dtype."""
    from train import sample

    dtype = json.loads((model_dir / "config.json").read_text()).get("dtype")
    half = "bf16_pure" if strategy.startswith("fsdp") else "bf16"
    return [
        "model=pretrained",
        f"model.name={_quoted(str(model_dir))}",
        f"objective={'mlm' if sample.is_masked(model_dir) else 'clm'}",
        "tokenizer=pretrained",
        f"tokenizer.name={_quoted(str(model_dir))}",
        f"strategy={strategy}",
        f"precision={half if dtype == 'bfloat16' else 'fp32'}",
        f"launcher.nproc_per_node={ranks}",
        "trainer.micro_batch_size=1",
        f"trainer.global_batch_size={ranks}",
        "data.sequence_length=8",
    ]


def _doctor(arguments: list[str]) -> int:
    """Say what is wrong with this machine and, with overrides, with a launcher's ranks."""
    options = doctor.parser().parse_args(arguments)
    here = machine.detect(os.environ)
    print(f"{platform.node()}\n")
    findings = health.look(Path(os.path.abspath(options.directory)), here, os.environ)
    print(doctor.text(findings), flush=True)
    if options.overrides:
        print("\nranks\n", flush=True)
        among_ranks = list(doctor.judge_ranks(_measured(options, here)))
        print(doctor.text(among_ranks))
        findings += among_ranks
    return FAILED if any(finding.state == "wrong" for finding in findings) else 0


def _measured(options: argparse.Namespace, here: Machine) -> list[dict[str, Any]]:
    """Start the ranks that the overrides ask for and return what each has measured.

    Raises UserError, which names the logs, where they do not come to an end.
    """
    (job,) = compose([*doctor.DEFAULTS, *options.overrides])
    tree = plain(job.tree)
    launcher = tree["launcher"]
    ranks = launcher.get("nproc_per_node", 1)
    if ranks == "auto":
        ranks = launcher["nproc_per_node"] = 1 if launcher["device"] == "cpu" else max(1, here.gpus)
    # No step is made, but a config has a batch that divides.
    tree["trainer"]["global_batch_size"] = ranks * launcher.get("nodes", 1)
    # Where all nodes see it, as a run directory.
    directory = Path(os.path.abspath(options.directory)) / time.strftime("doctor-%Y%m%d-%H%M%S")
    config = machine.resolve(from_tree(tree), here, str(directory))
    preflight.check_machine(config, here)
    made = preflight.create(config, directory)
    if config.launcher.kind == "slurm":
        measure = [sys.executable, "-m", "train.doctor", str(directory)]
        argv = job_script.waited_command(config, measure, submit.site_of(config))
        environment = commands.job_environment(config, os.environ)
    else:
        argv = commands.rank_command(config, directory, module="train.doctor", machine=here)
        environment = commands.rank_environment(config, here, os.environ)
        for name, text in commands.launcher_files(config, environment, here).items():
            (directory / name).write_text(text, encoding="utf-8")
    ended = start.run(
        argv,
        environment,
        stderr_file=directory / "logs" / report.TORCHRUN_LOG,
        grace_seconds=0.0,  # there is nothing to save
    )
    if ended.code != 0:
        failures = report.rank_failures(directory)
        raise UserError(report.failure(ended.code, failures, directory, ended.stopped_by))
    measured = json.loads((directory / doctor.REPORT).read_text())
    preflight.take_back(made)
    return measured


def _complete(arguments: list[str]) -> int:
    if any(argument.startswith("query=") for argument in arguments):
        candidates = completion.complete(
            os.environ.get("COMP_LINE", ""), (*COMMANDS, "--help", "--version")
        )
        if isinstance(candidates, list):
            print("\n".join(candidates))
            return 0
        os.environ["COMP_LINE"] = candidates
    compose(arguments)
    return 0


def _version() -> str:
    try:
        return importlib.metadata.version("shardwright")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, running from a checkout)"


if __name__ == "__main__":
    sys.exit(main())
