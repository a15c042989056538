"""Values for Weights & Biases.

The only file that imports wandb, and only where it is asked for the run that is active.
"""

from collections.abc import Mapping
from typing import Any

from bilevel.loop.sinks.base import Number, Sink, numbers


class WandB(Sink):
    """Logs to a run of Weights & Biases, which stays yours to finish.

    Steps below the run's present one are left out: wandb takes none, and after a resume (`wandb.init(id=...,
    resume="must")`) they are there already.

    Args:
        run: what wandb.init(...) returned; None takes the active run.

    Raises:
        ImportError: wandb is not installed (of run=None).
        RuntimeError: no run is active (of run=None).

    Example:
        >>> import bilevel as bl
        >>> class Run:  # in the place of wandb.init(project="...")
        ...     step = 0
        ...     def log(self, data, step=None): print(step, data); self.step = step
        >>> bl.loop.WandB(Run()).log(3, {"accuracy": 0.5})
        3 {'accuracy': 0.5}
    """

    def __init__(self, run: Any = None) -> None:
        self.run = _active() if run is None else run
        if not hasattr(self.run, "log") or not hasattr(self.run, "step"):
            raise TypeError(
                f"WandB() was given a {type(run).__name__}; the run that wandb.init(project=...) returns was needed"
            )

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        found = numbers("WandB", values)
        if step >= self.run.step:
            self.run.log(found, step=step)


def _active() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("WandB() needs wandb, which is not installed; write: pip install wandb") from error
    if wandb.run is None:
        raise RuntimeError("WandB() found no active run; write WandB(wandb.init(project=...))")
    return wandb.run
