"""`python -m mmkv_speed`: measures, and writes the pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape

from . import cpu as cpu_run
from . import gpu as gpu_run

RESULTS: Final = Path("benchmarks/results")
_DEFAULTS: Final = cpu_run.Settings(None)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
errors = Console(stderr=True)
Parts = Annotated[list[str] | None, typer.Option("--parts", help="measure these alone; prints only, but for --out")]
Out = Annotated[Path | None, typer.Option(help=f"folder for the pages, by default {RESULTS} for a whole run")]
Note = Annotated[str, typer.Option(help="what else ran on the machine, for the page")]


@app.callback()
def main() -> None:
    """What KV-cache compression costs in time and memory."""
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the user can mend is said in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error


def _say(text: str) -> None:
    errors.print(escape(text), highlight=False)


@app.command()
def cpu(
    peer: Annotated[str | None, typer.Option(help="python of an environment with kvpress 0.5.5")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="repeats of everything")] = _DEFAULTS.rounds,
    minutes: Annotated[float, typer.Option(help="begin no round that would end later")] = _DEFAULTS.minutes,
    steps: Annotated[int, typer.Option(min=2, help="decode steps, the first included")] = _DEFAULTS.steps,
    prompt: Annotated[int, typer.Option(min=1024, help="tokens")] = _DEFAULTS.prompt,
    parts: Parts = None,
    quick: Annotated[bool, typer.Option("--quick", help="one small round; prints only, but for --out")] = False,
    out: Out = None,
    work: Annotated[Path, typer.Option(help="finished rounds; an interrupted run goes on")] = _DEFAULTS.work,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget an interrupted run")] = False,
    note: Note = "",
) -> None:
    """On the CPU: requests beside kvpress, growth, operators against the machine's limits, import time."""
    torch.set_num_threads(1)
    chosen = tuple(parts) if parts else cpu_run.PARTS
    place = RESULTS if out is None and not quick and not parts else out
    settings = cpu_run.Settings(peer, chosen, rounds, minutes, steps, prompt, work=work, out=place)
    settings = replace(settings, fresh=fresh, note=note)
    with _plain_errors():
        print(cpu_run.run(settings.smaller() if quick else settings, _say))


@app.command()
def gpu(
    device: Annotated[str, typer.Option(help="cuda, or cpu with --tiny")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny shapes: shows that it runs, measures nothing")] = False,
    parts: Parts = None,
    minutes: Annotated[float, typer.Option(help="for everything; what does not fit is skipped and said")] = 9.0,
    tests: Annotated[bool, typer.Option(help="whether pytest runs the kernels' own tests first")] = True,
    out: Out = None,
) -> None:
    """On a GPU: kernels checked, every operator, whole models of 7B; in ten minutes, in one go."""
    chosen = tuple(parts) if parts else gpu_run.PARTS
    place = RESULTS if out is None and not tiny and not parts else out
    with _plain_errors():
        print(gpu_run.run(gpu_run.Settings(device, tiny, chosen, minutes, place, tests), _say))


@app.command()
def lazy(
    rounds: Annotated[int, typer.Option(min=1, help="of decoding")] = 5,
    prefills: Annotated[int, typer.Option(min=1, help="rounds of prefill")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="decode steps that count, of one more")] = 6,
    quick: Annotated[bool, typer.Option("--quick", help="one round, short prompts; prints only")] = False,
    out: Out = None,
    note: Note = "",
) -> None:
    """Lazy layers beside the plain model on the CPU: decode, prefill, and the batch that fits in a memory."""
    from . import lazy as lazy_run  # the bundled model's architecture, which nothing else needs

    torch.set_num_threads(1)
    place = RESULTS if out is None and not quick else out
    settings = lazy_run.Settings(1 if quick else rounds, 1 if quick else prefills, steps, quick, place, note)
    with _plain_errors():
        print(lazy_run.run(settings, _say))
