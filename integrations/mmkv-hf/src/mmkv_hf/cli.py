"""The command line: `mmkv methods`, `generate`, `profile-heads`, `profile-layers`. Needs mmkv-hf[cli]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from mmkv_pipelines import Stages

try:
    import typer
    from PIL import Image
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    raise ImportError("the command line needs typer, rich and pillow; install mmkv-hf[cli]") from error

app = typer.Typer(help="Vision-language models answering from a small KV cache.", no_args_is_help=True)
_console = Console()


def main() -> None:
    """Entry point of `mmkv`."""
    app()


@app.command()
def methods() -> None:
    """Lists the methods a pipeline can name, and says how they are joined."""
    from mmkv_pipelines import methods as known

    table = Table("name", "place", "what it does")
    for method in known():
        table.add_row(method.name, method.kind, method.summary)
    _console.print(table)
    for line in (
        'Join names with "+", settings in parentheses: adakv+mixkv+bacon+snapkv(window=16)',
        'reduce, prune and share are stages of their own; join stages with "|", leaving out what you do not want:',
        "prumerge | adsc(layers=[2],stride=3) | lazy(plan.json) | adakv+bacon",
    ):
        _console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Name or folder of a transformers model.")],
    prompt: Annotated[
        str, typer.Option(help="The question; with image placeholders of the model in it, the whole prompt.")
    ],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given several times.")] = None,
    pipeline: Annotated[str, typer.Option(help="Text form of the pipeline.")] = "adakv+bacon",
    budget: Annotated[str, typer.Option(help="Tokens (64), or a share of the prompt (0.1).")] = "0.1",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the kept vision tokens here.")] = None,
) -> None:
    """Answers one prompt from a compressed cache and reports what the cache holds."""
    with _clear_errors():
        _generate(model, prompt, image or [], pipeline, budget, max_new_tokens, plot)


@app.command()
def profile_heads(
    model: Annotated[str, typer.Option(help="Name or folder of a transformers model.")],
    pages: Annotated[Path, typer.Option(help="JSON Lines of pages with text boxes; the format is in the README.")],
    out: Annotated[Path, typer.Option(help="The table of head scores to write, for sparsemm(table=...).")],
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first pages.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens read aloud per page.")] = 1024,
) -> None:
    """Measures which heads look at what they read (SparseMM's visual heads)."""
    with _clear_errors():
        _profile_heads(model, pages, out, limit, max_new_tokens)


@app.command()
def profile_layers(
    model: Annotated[str, typer.Option(help="Name or folder of a transformers model.")],
    pages: Annotated[Path, typer.Option(help="JSON Lines of pages with prompts; the format is in the README.")],
    out: Annotated[Path, typer.Option(help="The plan of lazy layers to write.")],
    lazy_share: Annotated[float | None, typer.Option(help="Least share of the layers that become lazy.")] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="Instead: neighbours that differ by less (nats) are alike. Where none are, a plan without lazy layers "
            "is written, with a warning."
        ),
    ] = None,
    max_block: Annotated[int, typer.Option(help="Most layers of a block.")] = 5,
    mode: Annotated[str, typer.Option(help="visual or global.")] = "visual",
    over: Annotated[str, typer.Option(help="Tokens compared: all or vision.")] = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first pages.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the heat map of divergences here.")] = None,
) -> None:
    """Measures how differently the layers attend, and plans which become lazy (Lazy Attention / Q Cache)."""
    wanted = {"lazy_share": lazy_share, "epsilon": epsilon, "max_block": max_block, "mode": mode}
    with _clear_errors():
        _profile_layers(model, pages, out, wanted, over, limit, plot)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What the user can mend is one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), soft_wrap=True)
        raise typer.Exit(1) from error


def _warn(text: str) -> None:
    Console(stderr=True).print("[bold yellow]warning:[/]", escape(text), soft_wrap=True)


def _profile_heads(name: str, pages: Path, out: Path, limit: int | None, max_new_tokens: int) -> None:
    from transformers import AutoModelForImageTextToText

    from .plot import check_file
    from .profile import profile_heads, read_pages

    labelled = read_pages(pages)[:limit]
    check_file(out)
    processor = _processor(name)
    model = AutoModelForImageTextToText.from_pretrained(name)
    scores = profile_heads(
        model,
        lambda prompt, images: _inputs(processor, prompt, images).to(model.device),
        lambda token: str(processor.decode([token])),
        track(labelled, description="pages", console=Console(stderr=True)),
        max_new_tokens=max_new_tokens,
    )
    scores.save(out)
    _console.print(f"wrote {out}: {len(scores.scores)} layers of {len(scores.scores[0])} query heads", markup=False)


def _generate(
    name: str, prompt: str, paths: list[Path], pipeline: str, budget: str, max_new_tokens: int, plot: Path | None
) -> None:
    from transformers import AutoModelForImageTextToText

    from . import compress
    from .cache import checked_budget
    from .session import evicting

    method = Stages.parse(pipeline)  # what is wrong is said before the weights are read
    size = checked_budget(evicting(method), _number(budget))
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if plot is not None:
        _check_plot(plot, paths, method)
    images = [Image.open(path).convert("RGB") for path in paths]
    processor = _processor(name)
    model = AutoModelForImageTextToText.from_pretrained(name)
    inputs = _inputs(processor, prompt, images).to(model.device)
    if plot is not None:
        _check_grids(model.config, inputs)
    with compress(model, method, size) as session:
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answer = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    _console.print(answer, markup=False)
    _console.print(str(session.report()), markup=False, highlight=False)
    if plot is not None:
        session.report().plot(plot, images)
        _console.print(f"wrote {plot}", markup=False)


def _check_plot(plot: Path, images: list[Path], method: Stages) -> None:
    """Refuses a picture that could not be drawn once the answer is there."""
    from .plot import check_target

    check_target(plot)
    if not images:
        raise ValueError("--plot draws the kept tokens of images; give --image too")
    if method.reduce is not None:
        raise ValueError(
            f"--plot draws the tokens of an image at their places, which nobody knows any more behind a method that "
            f"reduces images, {type(method.reduce).__name__}; leave one of the two out"
        )


def _check_grids(config: Any, inputs: Any) -> None:
    """Refuses to draw images whose tokens are no grid."""
    from ._compat import modalities
    from .grids import known_grids

    kinds = modalities(config, inputs["input_ids"], inputs.get("mm_token_type_ids"))
    if known_grids(config, kinds, inputs) == [[]]:
        raise ValueError(
            "--plot draws plain grids, and the vision tokens of this model are none (tiles, line ends or video); leave "
            "it out"
        )


def _profile_layers(
    name: str, pages: Path, out: Path, wanted: dict[str, Any], over: str, limit: int | None, plot: Path | None
) -> None:
    from mmkv_layershare import LN2, plan_lazy_layers
    from transformers import AutoConfig, AutoModelForImageTextToText

    from .calibrate import plot_divergences, profile_layers
    from .kinds import layer_kinds
    from .plot import check_file, check_target
    from .profile import read_pages

    plan_lazy_layers([0.0] * 99, **wanted)  # says what is wrong with the settings before the weights are read
    if over not in ("all", "vision"):
        raise ValueError(f"over is 'all' or 'vision', not {over!r}")
    labelled = read_pages(pages)[:limit]
    check_file(out)
    if plot is not None:
        check_target(plot)
    processor, kinds = _processor(name), layer_kinds(AutoConfig.from_pretrained(name))
    plan_lazy_layers([0.0] * (len(kinds) - 1), kinds=kinds, **wanted)  # and what these layers cannot do
    model = AutoModelForImageTextToText.from_pretrained(name)
    prompts = (_inputs(processor, page.prompt, page.opened()).to(model.device) for page in labelled)
    bar = track(prompts, total=len(labelled), description="pages", console=Console(stderr=True))
    matrix = profile_layers(model, bar, over=over)  # type: ignore[arg-type]
    steps = matrix.diagonal(1).nan_to_num(LN2)
    plan = plan_lazy_layers(steps, kinds=kinds, model=name, **wanted)
    plan.save(out)
    if not plan.lazy:
        _warn(f"no layer is lazy: neighbours differ by {float(steps.min()):.2g} nats or more; raise --epsilon")
    _console.print(
        f"wrote {out}: {len(plan.lazy)} of {plan.num_layers} layers lazy, blocks {plan.blocks}", markup=False
    )
    if plot is not None:
        _console.print(f"wrote {plot_divergences(matrix, plot, plan)}", markup=False)


def _processor(name: str) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"no such folder, and not a model name: {name} ({str(error).splitlines()[0]})") from error


def _number(budget: str) -> int | float:
    try:
        return int(budget) if budget.lstrip("+-").isdigit() else float(budget)
    except ValueError:
        raise ValueError(
            f"the budget is a number of tokens (64) or a share of the prompt (0.1), not {budget!r}"
        ) from None


def _inputs(processor: Any, prompt: str, images: list[Any]) -> Any:
    """What the model reads: the prompt, in the model's chat form unless it places the images itself; one BOS."""
    text = _text(processor, prompt, len(images))
    bos = getattr(getattr(processor, "tokenizer", processor), "bos_token", None)
    settings = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    return processor(text=text, images=images or None, return_tensors="pt", **settings)


def _text(processor: Any, prompt: str, images: int) -> str:
    """The prompt with its image placeholders, in the model's chat form where it has one.

    A prompt that places the images itself is taken as it is.
    """
    token = getattr(processor, "image_token", "<image>")
    if token in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return str(text)
    return f"{token} " * images + prompt
