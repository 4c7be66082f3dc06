"""Lay out a machine of another architecture in a directory: Debian's arm64 Python and libraries, aarch64 wheels, a `python3`.

    python -m tests.runtime.arm.prepare DIRECTORY

Everything stays in the directory, and no rights of root are needed. ``DIRECTORY/venv/bin/python3`` runs Debian's Python in
qemu's emulation of user programs. It is a script, so a process that starts ``sys.executable`` gets an emulated one as well,
without help of the kernel (binfmt_misc).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SUITE, MIRROR = "trixie", "http://deb.debian.org/debian"
PACKAGES = "base-files,usr-is-merged,libc6,libgcc-s1,libstdc++6,python3.13"
#: Versions of glibc that wheels are built for, up to trixie's 2.41: llguidance needs 2.31, and pip does not count downwards.
GLIBC = (17, 24, 26, 27, 28, 31, 34, 35, 39, 41)
#: What only the tests need, in a directory of its own: the device side must import without onnx.
TESTING = ("pytest", "pytest-timeout", "hypothesis", "onnx", "safetensors")
TOOLS = {"qemu-aarch64": "qemu-user", "mmdebstrap": "mmdebstrap"}


def require_tools() -> None:
    """Exit with one line if a program is missing."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        sys.exit(f"make test-arm needs {' and '.join(missing)}: apt-get install {' '.join(missing)}")


def site_packages(directory: Path) -> Path:
    """Directory of the emulated environment's packages."""
    return directory / "venv" / "lib" / "python3.13" / "site-packages"


def install(target: Path, *what: str | Path) -> None:
    """Install aarch64 wheels into a directory, with the versions of constraints.txt."""
    platforms = [f"--platform=manylinux_2_{version}_aarch64" for version in GLIBC]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--upgrade"]
    command += [*platforms, "--platform=manylinux2014_aarch64", "--python-version=3.13", "--implementation=cp"]
    command += ["--constraint", str(ROOT / "constraints.txt"), "--target", str(target), *map(str, what)]
    subprocess.run(command, check=True)


def build_wheel(directory: Path) -> Path:
    """The wheel of this source tree, built without a network."""
    out = directory / "dist"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def write_python(directory: Path) -> None:
    """Write the script `python3` and make it that of a virtual environment over Debian's Python."""
    system = directory / "system"
    script = directory / "venv" / "bin" / "python3"
    script.parent.mkdir(parents=True)
    script.write_text(f'#!/bin/sh\nexec qemu-aarch64 -L "{system}" -0 "$0" "{system}/usr/bin/python3.13" "$@"\n')
    script.chmod(0o755)
    (directory / "venv" / "pyvenv.cfg").write_text(
        f"home = {system / 'usr/bin'}\ninclude-system-site-packages = false\n"
    )


def main() -> None:
    require_tools()
    directory = Path(sys.argv[1]).resolve()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    system = directory / "system"
    command = ["mmdebstrap", "--quiet", "--variant=extract", "--arch=arm64", f"--include={PACKAGES}"]
    subprocess.run([*command, SUITE, str(system), MIRROR], check=True)
    for path in system.iterdir():  # an empty /proc or /tmp here would hide the host's
        if path.is_dir() and not path.is_symlink() and path.name not in ("usr", "etc"):
            shutil.rmtree(path)
    write_python(directory)
    install(site_packages(directory), f"{build_wheel(directory)}[cpu,serve,structured]")
    install(directory / "testing", *TESTING)


if __name__ == "__main__":
    main()
