"""The command line, called in this process or in another one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from scalpel.cli import commands as cli


def invoke(*arguments: str | Path) -> Result:
    done = CliRunner(env={"COLUMNS": "140", "NO_COLOR": "1"}).invoke(cli.app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def command_line(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    code = "from scalpel.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, **options)
