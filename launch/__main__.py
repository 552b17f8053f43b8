"""Launch and supervise runs: python -m launch VERB ...

Imports of a verb stay in its function, so that every verb answers at once.
"""

import argparse
import difflib
import os
import shlex
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from megalm.command_line import count, count_or_zero
from megalm.errors import MegalmError, main_guard, writing


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise MegalmError(f"{self.prog}: {message.removeprefix('argument ')} ({self.prog} --help says more)")

    def refuse_unknown(self, arguments: Iterable[str]) -> None:
        """Raises MegalmError for an option that this parser does not have, with the closest that it has."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for name in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
            if name != "--" and not any(option.startswith(name) for option in known):
                raise MegalmError(f"{self.prog} has no option {name}{_closest(name, known)}")


def _closest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f": it has {', '.join(known)}"


def add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML of the run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="launch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    submit = verbs.add_parser(
        "submit", help="a job for Slurm that saves, requeues and restarts itself until it is done"
    )
    add_training(submit)
    submit.add_argument("--site", metavar="FILE", help="site profile (docs/launch.md); default: $MEGALM_SITE")
    submit.add_argument("--nodes", type=count, metavar="N")
    submit.add_argument("--gpus-per-node", type=count_or_zero, metavar="N")
    submit.add_argument("--ranks-per-node", type=count, metavar="N", help="where it is not the number of GPUs")
    submit.add_argument("--partition", metavar="NAME")
    submit.add_argument("--account", metavar="NAME")
    submit.add_argument("--time", metavar="LIMIT", help="time limit, as Slurm spells it")
    submit.add_argument("--container", metavar="IMAGE")
    submit.add_argument(
        "--site-set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the profile; repeatable"
    )
    submit.add_argument(
        "--chain", type=count, default=1, metavar="N", help="N jobs in a row, where none may be requeued"
    )
    submit.add_argument("--by", choices=("sbatch", "submitit"), default="sbatch")

    local = verbs.add_parser("local", help="run and supervise on this machine")
    add_training(local)
    local.add_argument("--ranks", type=count, metavar="N", help="default: one per GPU, or one")
    for name in ("deepspeed", "torchrun"):
        other = verbs.add_parser(name, help=f"run by {name}, on this machine or those of a hostfile")
        add_training(other)
        other.add_argument("--hostfile", type=Path, help="NAME slots=N a line")
        other.add_argument("--ranks", type=count, metavar="N", help="on this machine; default: one per GPU, or one")

    for name, about in (
        ("status", "how far a run is, its jobs and what happened"),
        ("cancel", "end a run's jobs for good"),
        ("requeue", "let a run save and go back into the queue"),
    ):
        verbs.add_parser(name, help=about).add_argument("run", type=Path, metavar="RUN")
    logs = verbs.add_parser("logs", help="the newest log of a run")
    logs.add_argument("run", type=Path, metavar="RUN")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("-n", "--lines", type=count, default=50, metavar="N")

    report = verbs.add_parser("report", help="one HTML page: curves, events, ranks")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/launch/report.html")
    watch = verbs.add_parser("watch", help="a live view in the terminal")
    watch.add_argument("run", type=Path, metavar="RUN")
    verbs.add_parser("doctor", help="what this machine's install has, lacks, and has of the wrong kind")

    job = verbs.add_parser("job", help="what the scripts in slurm/ call inside a job")
    job.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ARGUMENT ...")
    agent = verbs.add_parser("agent", help="what the supervisor starts on every node")
    agent.add_argument("--join", required=True, metavar="HOST:PORT")
    agent.add_argument("--name", default="")
    if not arguments or (arguments[0] not in verbs.choices and not arguments[0].startswith("-")):
        names = list(verbs.choices)
        what = f"there is no verb {arguments[0]}{_closest(arguments[0], names)}" if arguments else ""
        raise MegalmError(f"launch: {what or 'name what to do, one of ' + ', '.join(names)}")
    if arguments[0] in verbs.choices and arguments[0] != "job":  # what follows a script is the script's
        # Before what is missing is asked for: a misspelt option is why it is missing.
        verbs.choices[arguments[0]].refuse_unknown(arguments[1:])
    return parser.parse_args(arguments)


def submit(given: argparse.Namespace) -> int:
    from launch import submit as submission
    from launch.target import training

    keys = ("nodes", "gpus_per_node", "ranks_per_node", "partition", "account", "time", "container")
    # Quoted, since a name of digits is still a name.
    overrides = [
        f"{key}={value if isinstance(value, int) else repr(value)}"
        for key in keys
        if (value := getattr(given, key)) is not None
    ]
    sets = [part for each in given.set for part in ("--set", each)]
    made = submission.submission(
        training(given.config, given.set),
        [given.config, *sets],
        [*overrides, *given.site_set],
        chain=given.chain,
        profile=given.site,
    )
    if given.by == "submitit":
        from launch import submitted

        print(submitted.submit(made, dry_run=given.dry_run))
        return 0
    print(made.spelled())
    if not given.dry_run:
        for number in submission.submit(made):
            print(f"submitted job {number}: python -m launch status {made.target.folder}")
    return 0


def local(given: argparse.Namespace) -> int:
    from launch import job, site
    from launch.target import training

    target = training(given.config, given.set)
    ranks = given.ranks or job.gpus() or 1
    if given.dry_run:
        if problem := target.problem(ranks):
            raise MegalmError(problem)
        print(f"{ranks} x {shlex.join(target.command)}")
        return 0
    return job.here(target, site.of_environment(), ranks)


def by_other_launcher(given: argparse.Namespace) -> int:
    from launch import job, machines
    from launch.target import training

    target = training(given.config, given.set)
    ranks = given.ranks or job.gpus() or 1
    if given.verb == "deepspeed":
        commands = [machines.deepspeed_command(target, given.hostfile, ranks, job.visible_gpus())]
    else:
        commands = machines.torchrun_commands(target, given.hostfile, ranks)
    if given.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return 0
    return machines.execute(commands)


def main() -> int:
    given = parsed(sys.argv[1:])
    if given.verb == "submit":
        return submit(given)
    if given.verb == "local":
        return local(given)
    if given.verb in ("deepspeed", "torchrun"):
        return by_other_launcher(given)
    if given.verb == "job":
        from launch import job

        if not given.command:
            raise MegalmError("launch job needs a script and its arguments: launch job megalm/train.py --config FILE")
        return job.in_slurm(given.command)
    if given.verb == "agent":
        from launch import agent

        return agent.serve(given.join, given.name or os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    if given.verb == "doctor":
        from launch import doctor

        findings = doctor.examine()
        print("\n".join(doctor.report(findings)))
        return int(any(each.state in (doctor.MISSING, doctor.WRONG) for each in findings))
    if given.verb == "report":
        from launch import report

        output = given.output or given.run / "launch" / "report.html"
        with writing(output):
            report.write(given.run, output)
        print(f"report: {output}")
        return 0
    if given.verb == "watch":
        from launch.watch import watch

        return watch(given.run)
    from launch import slurm, status

    if given.verb == "status":
        print("\n".join(status.describe(given.run)))
    elif given.verb == "logs":
        return status.show_log(given.run, follow=given.follow, lines=given.lines)
    else:
        for number in status.waiting_or_running(given.run):
            if given.verb == "cancel":
                slurm.cancel(number)
            else:
                slurm.warn(number)
            print(f"{given.verb}: job {number}")
    return 0


if __name__ == "__main__":
    main_guard(main)
