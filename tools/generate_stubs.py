"""Write the Python stubs of the contract: `python tools/generate_stubs.py [--check]`.

With --check nothing is written; the exit code says whether the committed stubs are current.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "client" / "pageferry" / "v1"


def generate(into: Path) -> None:
    """Run protoc for every .proto file; the stubs land in `into`/pageferry/v1."""
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    bundled = files("grpc_tools") / "_proto"
    subprocess.run(  # noqa: S603 - our own arguments
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{bundled}",
            f"--python_out={into}",
            f"--mypy_out=quiet:{into}",
            f"--grpc_python_out={into}",
            f"--mypy_grpc_out=quiet:{into}",
            *protos,
        ],
        check=True,
        # protoc finds its mypy plugins beside the interpreter.
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    (into / "pageferry" / "v1" / "__init__.py").write_text('"""Generated from proto/pageferry/v1; do not edit."""\n')


def stale(fresh: Path) -> list[str]:
    """Return the names of committed stubs that differ from `fresh`, are missing, or should not be there."""
    names = {path.name for path in fresh.iterdir()} | {path.name for path in COMMITTED.glob("*.py*")}
    _, different, absent = filecmp.cmpfiles(fresh, COMMITTED, sorted(names), shallow=False)
    return sorted([*different, *absent])


def main() -> int:
    """Generate, or compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / "pageferry" / "v1"
        if check:
            outdated = stale(fresh)
            if outdated:
                print(f"stubs are not current, run 'make proto': {', '.join(outdated)}", file=sys.stderr)
            return 1 if outdated else 0
        shutil.rmtree(COMMITTED, ignore_errors=True)
        shutil.copytree(fresh, COMMITTED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
