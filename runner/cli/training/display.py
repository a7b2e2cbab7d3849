"""Display of a training run: a panel on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runner.cli.shared.output import Output, printable

if TYPE_CHECKING:
    from runner.config.params import RunConfig
    from runner.training.run.events import Evaluated, Event, StepDone

_BARS = "▁▂▃▄▅▆▇█"
#: Number of losses in the curve, each the mean of as many steps as fit.
_CURVE = 60


@contextmanager
def training_display(
    output: Output, target: int, runconfig: RunConfig
) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows the events of a run that trains to step `target`."""
    if output.live:
        with _panel(output, target, runconfig) as show:
            yield show
    else:
        yield lambda event: _line(output, event, target)


def _line(output: Output, event: Event, target: int) -> None:
    from runner.cli.evaluation.records import metrics_line
    from runner.training.run.events import Evaluated, StepDone

    match event:
        case StepDone():
            output.note(step_line(event, target))
        case Evaluated():
            output.data(metrics_line(event.metrics | {"global_step": event.step}))
            if event.is_best:
                output.note(_best(event))
        case _:
            output.note(_message(event))


def _best(event: Evaluated) -> str:
    return f"step {event.step} is the best so far"


def _message(event: Event) -> str:
    """Return the line of an event that is neither a step nor an evaluation."""
    from runner.training.run.events import Saved, Skipped, StoppedEarly, Warning

    match event:
        case Skipped():
            return (
                f"warning: gradients overflowed after step {event.step}: nothing was updated; "
                f"the loss scale is {event.loss_scale:g}"
            )
        case Saved():
            return f"saved {event.path}"
        case StoppedEarly():
            return (
                f"stopped early at step {event.step}: {event.reason}. To train on: "
                "--set runconfig.early_stopping=null, or with a larger patience"
            )
        case Warning():
            return f"warning: {event.text}"
        case _:
            raise AssertionError(event)


def step_line(event: StepDone, target: int) -> str:
    """Return the line of a step for people."""
    line = (
        f"step {event.step:>6}/{target}  loss {event.loss:.4f}  lr {event.learning_rate:.3g}  "
        f"grad norm {event.unclipped_grad_norm:.3g}"
    )
    if event.loss_scale is not None:
        line += f"  scale {event.loss_scale:g}"
    return "  ".join((line, *_resources(event)))


def _resources(event: StepDone) -> Iterator[str]:
    has = event.resources
    if has.get("tokens_per_second"):
        yield f"{has['tokens_per_second']:,.0f} tokens/s"
        yield f"{100 * (has['model_flops_utilization'] or 0):.0f} % MFU"
    if memory := has.get("peak_rss_bytes"):
        yield f"{memory / 1e9:.1f} GB"
    if (seconds := has.get("seconds_left")) is not None:
        left = round(seconds)
        yield f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} to go"


def _next_checkpoint(step: int, target: int, runconfig: RunConfig) -> str:
    """Return in words when the next checkpoint is written."""
    every = runconfig.save_checkpoints_steps
    at = min((step // every + 1) * every, target)
    return f"next checkpoint at step {at}" if step < target else "done"


def sparkline(values: Sequence[float], width: int = _CURVE) -> str:
    """Return values as a row of bars, the newest on the right; many values share a bar."""
    size = -(-len(values) // width)
    groups = [values[at : at + size] for at in range(0, len(values), size or 1)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means, default=0.0), max(means, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((mean - low) / step)] for mean in means)


@contextmanager
def _panel(output: Output, target: int, runconfig: RunConfig) -> Iterator[Callable[[Event], None]]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from runner.cli.evaluation.records import metrics_line
    from runner.training.run.events import Evaluated, StepDone

    console = Console(stderr=True, highlight=False)
    losses: deque[float] = deque(maxlen=100 * _CURVE)

    def picture(event: StepDone) -> Any:
        first = f"step {event.step}/{target}  loss {event.loss:.4f}  lr {event.learning_rate:.3g}"
        first += f"  grad norm {event.unclipped_grad_norm:.3g}"
        if event.loss_scale is not None:
            first += f"  scale {event.loss_scale:g}  skipped {event.skipped}"
        curve = Text(sparkline(list(losses)), style="cyan")
        curve.append(f"  {max(losses):.3f} → {event.loss:.3f}", style="dim")
        done = round(_CURVE * event.step / target)
        bar = Text.assemble(("━" * done, "green"), ("━" * (_CURVE - done), "dim"))
        last = [*_resources(event), _next_checkpoint(event.step, target, runconfig)]
        return Group(Text(first), curve, bar, Text("  ".join(last), style="dim"))

    begin = Text("loading is done; the first step compiles the model", style="dim")
    # stdout is not redirected, because it may be a file.
    with Live(begin, console=console, auto_refresh=False, redirect_stdout=False) as live:

        def show(event: Event) -> None:
            match event:
                case StepDone():
                    losses.append(event.loss)
                    live.update(picture(event), refresh=True)
                case Evaluated():
                    line = metrics_line(event.metrics | {"global_step": event.step})
                    if sys.stdout.isatty() and not output.json:
                        console.print(printable(line), markup=False)
                    else:
                        output.data(line)
                    if event.is_best:
                        console.print(_best(event), markup=False)
                case _:
                    console.print(printable(_message(event)), markup=False)

        yield show
