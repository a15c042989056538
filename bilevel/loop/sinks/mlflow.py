"""Values for MLflow.

The only file that imports mlflow, and only where it is asked for the run that is active, or for a client.
"""

import time
from collections.abc import Mapping
from typing import Any

from bilevel.loop.sinks.base import Number, Sink, numbers


class MLflow(Sink):
    """Logs metrics to a run of MLflow, which stays yours to end.

    A value whose step is not above the last one that the run has of that name is left out: after a resume (with the
    same run id) it is there already. That is asked once for each name.

    Args:
        run_id: of the run; None takes the active one.
        client: an mlflow.MlflowClient; None makes one of the tracking server that is set.

    Raises:
        ImportError: mlflow is not installed.
        RuntimeError: no run is active (of run_id=None).

    Example:
        >>> import bilevel as bl
        >>> bl.loop.MLflow  # MLflow(mlflow.start_run().info.run_id)
        <class 'bilevel.loop.sinks.mlflow.MLflow'>
    """

    def __init__(self, run_id: str | None = None, *, client: Any = None) -> None:
        mlflow = _mlflow()
        if run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise RuntimeError("MLflow() found no active run; write MLflow(mlflow.start_run().info.run_id)")
            run_id = active.info.run_id
        if not isinstance(run_id, str):
            raise TypeError(f"MLflow() was given a {type(run_id).__name__} as run_id; run.info.run_id was needed")
        self.run_id = run_id
        self._client = mlflow.MlflowClient() if client is None else client
        self._metric = mlflow.entities.Metric
        self._last: dict[str, int] = {}

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        now, fresh = int(1000 * time.time()), []
        for name, value in numbers("MLflow", values).items():
            if step > self._last_of(name):
                fresh.append(self._metric(name, value, now, step))
                self._last[name] = step
        if fresh:
            self._client.log_batch(self.run_id, metrics=fresh)

    def _last_of(self, name: str) -> int:
        if name not in self._last:
            history = self._client.get_metric_history(self.run_id, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last[name]


def _mlflow() -> Any:
    try:
        import mlflow
    except ImportError as error:
        raise ImportError("MLflow() needs mlflow, which is not installed; write: pip install mlflow") from error
    return mlflow
