"""Every environment of mmkv, made from the pins: torch first, with its exact version, then the rest."""

from __future__ import annotations

import pathlib
import shutil
import tomllib
import zipfile
from collections.abc import Iterable

import nox
from packaging.version import Version

ROOT = pathlib.Path(__file__).parent
PROJECTS = sorted(
    path.parent
    for pattern in ("kernels", "packages/*", "integrations/*", "benchmarks/*")
    for path in ROOT.glob(f"{pattern}/pyproject.toml")
)
META = {path: tomllib.loads((path / "pyproject.toml").read_text())["project"] for path in PROJECTS}
FOLDER = {meta["name"]: path for path, meta in META.items()}
MODULE = {name: name.replace("-", "_") for name in FOLDER}
CONSTRAINTS = ROOT / "constraints.txt"
NOT_HERE = ("triton", "lmms")  # extras for GPUs, and for an environment of its own
PINS = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line and line[0] != "#")
TRITON = META[FOLDER["mmkv-kernels"]]["optional-dependencies"]["triton"]  # its interpreter and compilers need no GPU
TORCH = f"torch=={PINS['torch']}"
SUPPORTED = ("5.17.0", "5.20.0", PINS["transformers"])

nox.options.sessions = ["tests", "lint", "types", "wheels", "docs"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *requirements: str) -> None:
    """Torch by its pin, then everything else under the constraints, then our packages, editable, by path."""
    session.install(TORCH)
    session.install(*requirements, *third_party(), "-c", str(CONSTRAINTS))
    install_tree(session)


def install_tree(session: nox.Session) -> None:
    """Our packages, editable, by path, with nothing they depend on."""
    session.install("hatchling>=1.26", "editables", "-c", str(CONSTRAINTS))
    session.install("--no-build-isolation", "--no-deps", *(a for path in PROJECTS for a in ("-e", str(path))))


def third_party(names: Iterable[str] = FOLDER, *, extras: bool = True) -> list[str]:
    """What these packages of ours, and their extras but those of `NOT_HERE`, take from others."""
    needed: set[str] = set()
    for meta in (META[FOLDER[name]] for name in names):
        groups = meta.get("optional-dependencies", {}) if extras else {}
        optional = [requirement for name, group in groups.items() if name not in NOT_HERE for requirement in group]
        needed |= {r for r in [*meta.get("dependencies", []), *optional] if not r.startswith("mmkv-")}
    return sorted(needed)


def lowest_allowed(requirements: Iterable[str]) -> dict[str, Version]:
    """Name -> the oldest version that all of these requirements allow."""
    floors: dict[str, Version] = {}
    for requirement in requirements:
        name, _, version = requirement.partition(",")[0].partition(">=")
        floors[name] = max(Version(version), floors.get(name, Version("0")))
    return floors


def run_tests(session: nox.Session, *arguments: str) -> None:
    """pytest over every package, each against what is installed, two processes with one thread each."""
    folders = [str(path / "tests") for path in PROJECTS if (path / "tests").is_dir()]
    session.run("python", "-m", "pytest", *arguments, *(session.posargs or folders), env={"OMP_NUM_THREADS": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """The bundled model reads pages from a full and from compressed caches."""
    install(session)
    session.run("python", "-m", "mmkv_testbed.demo", *session.posargs, env={"OMP_NUM_THREADS": "2"})


@nox.session
def tests(session: nox.Session) -> None:
    """All tests of all packages."""
    install(session, "pytest", "pytest-xdist", "hypothesis", *TRITON)
    run_tests(session, "-n", "2", "--dist", "loadfile")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, and import-linter for the floors."""
    session.install("ruff", "import-linter", "-c", str(CONSTRAINTS))
    install_tree(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict over the sources."""
    install(session, "mypy", "types-tqdm")
    session.run("mypy", *(str(path / "src") for path in PROJECTS), env={"MYPYPATH": _mypy_path()})


@nox.session
def lowest(session: nox.Session) -> None:
    """All tests with the oldest versions allowed, but for torch, whose older builds bring gigabytes of CUDA."""
    floors = [f"{name}=={version}" for name, version in lowest_allowed([*third_party(), *TRITON]).items()]
    session.install(TORCH)
    session.install("pytest", "pytest-xdist", "hypothesis", *(f for f in floors if not f.startswith("torch==")))
    install_tree(session)
    run_tests(session, "-n", "2", "--dist", "loadfile")


@nox.session
@nox.parametrize("transformers", SUPPORTED)
def hf(session: nox.Session, transformers: str) -> None:
    """The transformers adapter over the supported versions of transformers."""
    install(session, "pytest", "pytest-xdist", "hypothesis")
    session.install(TORCH, f"transformers=={transformers}")
    folders = [FOLDER["mmkv-hf"] / "tests", FOLDER["mmkv-testkit"] / "tests"]
    arguments = session.posargs or [str(folder) for folder in folders]
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def wheels(session: nox.Session) -> None:
    """Builds every wheel; each is imported with its declared dependencies and nothing else installed.

    One environment serves all: wheels come in the order of what they need, so it never holds more than the next one
    declares. Our own distributions come from dist/ alone.
    """
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install(TORCH)
    session.install("build", "hatchling>=1.26", "-c", str(CONSTRAINTS))
    for path in PROJECTS:
        session.run("python", "-m", "build", "--no-isolation", "--wheel", "--outdir", str(dist), str(path), silent=True)
    for name in sorted(FOLDER, key=lambda name: len(third_party(_closure(name), extras=False))):
        session.run("python", "-m", "pip", "uninstall", "-q", "-y", *FOLDER, silent=True)
        _check_contents(session, next(dist.glob(f"{MODULE[name]}-*.whl")), MODULE[name])
        session.install(*third_party(_closure(name), extras=False), "-c", str(CONSTRAINTS))
        session.install("--no-index", "--no-deps", "--find-links", str(dist), *sorted(_closure(name)))
        session.run("python", "-c", f"import {MODULE[name]} as m; print(m.__name__, 'imports from its wheel')")
    session.run("python", "-m", "pip", "check")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, strict."""
    session.install("mkdocs-material", "mkdocstrings[python]", "-c", str(CONSTRAINTS))
    session.run("mkdocs", "build", "--strict")


@nox.session
def quality(session: nox.Session) -> None:
    """Every method on the bundled models; a quick run leaves the committed pages alone."""
    install(session)
    pages = () if "--quick" in session.posargs else ("--pages", "benchmarks/results")
    session.run("python", "-m", "mmkv_quality", "run", *pages, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lmms(session: nox.Session) -> None:
    """lmms-eval's own command with our model beside our harness, in an environment of 2.5 GB."""
    pins = FOLDER["mmkv-lmms-eval"] / "constraints.txt"
    extras = META[FOLDER["mmkv-lmms-eval"]]["optional-dependencies"]["lmms"]
    needed = third_party(_closure("mmkv-lmms-eval") | _closure("mmkv-testbed"), extras=False)
    session.install(TORCH)
    session.install(TORCH, "pytest", *extras, *needed, "-c", str(pins))
    install_tree(session)
    arguments = session.posargs or [str(FOLDER["mmkv-lmms-eval"] / "tests")]
    session.run("python", "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def accounting(session: nox.Session) -> None:
    """Multiply-adds and bytes that lazy layers and pruning save on published geometries."""
    install(session)
    session.run("python", "benchmarks/accounting/run.py", env={"OMP_NUM_THREADS": "1"})


@nox.session
def lazy(session: nox.Session) -> None:
    """Speed of lazy layers beside the plain model; ten minutes on one core, better a quiet one."""
    install(session)
    session.run("python", "-m", "mmkv_speed", "lazy", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def speed(session: nox.Session) -> None:
    """Speed on the CPU beside kvpress, which gets an environment of its own; 20 minutes, better on a quiet machine."""
    install(session)
    peer = pathlib.Path(session.virtualenv.location) / "peer"
    python = str(peer / "bin" / "python")
    if not peer.exists():
        session.run("python", "-m", "venv", str(peer))
    pins = str(FOLDER["mmkv-speed"] / "peer-constraints.txt")
    session.run(python, "-m", "pip", "install", "-q", TORCH, external=True)
    session.run(python, "-m", "pip", "install", "-q", TORCH, "kvpress", "-c", pins, external=True)
    session.run("python", "-m", "mmkv_speed", "cpu", "--peer", python, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def finetune(session: nox.Session) -> None:
    """Fine-tuning inside ADSC and lazy attention beside the plain model's; 15 minutes of CPU time."""
    install(session)
    session.run("python", "benchmarks/finetune/run.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(name="train")
def train(session: nox.Session) -> None:
    """Trains the bundled model from its seed, on one thread."""
    install(session)
    session.run("python", "-m", "mmkv_testbed.train", *session.posargs, env={"OMP_NUM_THREADS": "1"})


def _closure(name: str) -> set[str]:
    """A distribution and the mmkv distributions it depends on."""
    found, queue = set(), [name]
    while queue:
        one = queue.pop()
        found.add(one)
        queue += [
            d for d in map(_distribution, META[FOLDER[one]].get("dependencies", [])) if d in FOLDER and d not in found
        ]
    return found


def _check_contents(session: nox.Session, wheel: pathlib.Path, module: str) -> None:
    """A wheel holds its module, its metadata and licence, and nothing left behind by an editor or a patch."""
    names = zipfile.ZipFile(wheel).namelist()
    suffixes = {".py", ".typed", ".json", ".jinja", ".safetensors"}
    content = [pathlib.PurePath(n) for n in names if ".dist-info/" not in n]
    stray = [str(n) for n in content if n.parts[0] != module or n.suffix not in suffixes]
    missing = [n for n in (f"{module}/py.typed", "licenses/LICENSE") if not any(found.endswith(n) for found in names)]
    if stray or missing:
        session.error(f"{wheel.name}: stray {stray}, missing {missing}")


def _distribution(requirement: str) -> str:
    return requirement.partition(">")[0].partition("[")[0].partition("=")[0].strip()


def _mypy_path() -> str:
    return ":".join(str(path / "src") for path in PROJECTS)
