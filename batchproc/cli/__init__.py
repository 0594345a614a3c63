"""The command line. A verb parses, calls one function, prints.

Exit codes: 0 all done; 1 finished, some images failed (they are listed) or are missing; 2 usage or bad configuration;
3 a bug or a fault. Results go to standard output, progress and errors to standard error. Everything heavy is imported
inside the verbs, so that ``--help`` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

import click

import batchproc
from batchproc.cli.common import INTERRUPTED, InOrder, complain, example
from batchproc.cli.evaluation import evaluate
from batchproc.cli.finish import finish
from batchproc.cli.manifests import manifest
from batchproc.cli.models import models
from batchproc.cli.running import classify, classify_alerts, demo, report, retry, run, status
from batchproc.cli.submit import submit
from batchproc.cli.training import train
from batchproc.cli.verify import verify
from batchproc.errors import BatchprocError, ClusterError, DamagedRunError, StorageError

__all__ = ["cli", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code; foreseen errors are a line on standard error, not a traceback."""
    try:
        code = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False) or 0
    except click.Abort:
        complain("interrupted; the same command again goes on from here")
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = 2
    except (ClusterError, DamagedRunError, StorageError) as error:
        complain(str(error))
        code = 3
    except BatchprocError as error:
        complain(str(error))
        code = 2
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            what = error.strerror or str(error) or type(error).__name__
            complain(f"{error.filename or ''}: {what}".removeprefix(": "))
        code = 3
    except Exception:
        traceback.print_exc()
        complain("this is a bug in batchproc; please report it with the lines above")
        code = 3
    sys.exit(code)


@click.group(
    cls=InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=example(
        "batchproc demo",
        "batchproc manifest build night/*.fits --reference refs/*.fits -o night.csv",
        "batchproc run night.csv --out RUN",
    ),
)
@click.version_option(batchproc.__version__, prog_name="batchproc")
def cli() -> None:
    """Find what changed in the sky: image subtraction, detection and classification of whole surveys."""


_RUNS = (demo, manifest, run, submit, status, verify, retry, report, classify)
for _verb in (*_RUNS, classify_alerts, finish, models, train, evaluate):
    cli.add_command(_verb)
