"""What a run would cost, found on tensors without data: nothing is allocated, nothing computed, and no GPU is needed."""

from bilevel_profiling.forecasting.fake import ForecastError as ForecastError
from bilevel_profiling.forecasting.fake import forecast as forecast
