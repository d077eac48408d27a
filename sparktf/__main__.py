"""The command line: ``python -m sparktf score`` and ``python -m sparktf doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

if not __package__:
    # spark-submit runs this file as a script and puts its directory first: modules of other packages must
    # not be found in it under our names.
    sys.path[:] = [
        entry for entry in sys.path if os.path.realpath(entry) != os.path.dirname(os.path.realpath(__file__))
    ]

from sparktf._version import __version__
from sparktf.errors import ParamError, SparktfError

OK, FAILED, WRONG_ARGUMENTS = 0, 1, 2
"""The exit codes; argparse uses 2 for wrong arguments, too."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="sparktf", description="Distributed TensorFlow inside Apache Spark.")
    parser.add_argument("--version", action="version", version=f"sparktf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what this machine has, and what is missing to train")
    _add_score(commands.add_parser("score", help="score a table with a saved model; works under spark-submit"))
    return parser


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="path of a saved TFModel or PipelineModel")
    parser.add_argument("--input", required=True, help="path of the table to score")
    parser.add_argument("--output", required=True, help="path to write; it appears when it is complete")
    parser.add_argument("--format", default="parquet", help="Spark format of input and output (default: parquet)")
    parser.add_argument("--output-format", default="", help="Spark format of the output, where it is another")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the reader")
    parser.add_argument(
        "--select", default="", metavar="COLUMNS", help="columns to write, with commas; all if not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; the process's own if not given.

    Returns
    -------
    int
        0: done. 1: the job failed, or this machine cannot train. 2: wrong arguments or paths.
    """
    options = build_parser().parse_args(arguments)
    try:
        return _doctor() if options.command == "doctor" else _score(options)
    except SparktfError as error:
        print(f"sparktf {options.command}: {error}", file=sys.stderr)
        return WRONG_ARGUMENTS if isinstance(error, ParamError) else FAILED


def _doctor() -> int:
    from sparktf.doctor import examine, report

    findings = examine()
    print(report(findings))
    return OK if all(finding.ok for finding in findings) else FAILED


def _score(options: argparse.Namespace) -> int:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    from sparktf.ml.batch_score import ScoreJob, score
    from sparktf.session import local_session

    wrong = [option for option in options.option if "=" not in option]
    if wrong:
        raise ParamError(f"--option {wrong[0]}: expected NAME=VALUE.")
    job = ScoreJob(
        model=options.model,
        input=options.input,
        output=options.output,
        format=options.format,
        output_format=options.output_format,
        select=[name.strip() for name in options.select.split(",") if name.strip()],
        options=dict(option.split("=", 1) for option in options.option),
        overwrite=options.overwrite,
    )
    before = SparkSession.getActiveSession()
    spark = local_session(None, "sparktf score")
    try:
        print(score(spark, job), flush=True)
    except (PySparkException, Py4JError) as error:
        print(f"sparktf score: the job failed: {error}", file=sys.stderr)
        return FAILED
    finally:
        # A session that was here before us is its owner's to stop.
        if before is None:
            spark.stop()
    return OK


if __name__ == "__main__":
    sys.exit(main())
