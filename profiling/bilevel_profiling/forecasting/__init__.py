"""What a run would cost, found on tensors without data: nothing is allocated, nothing computed, and no GPU is
needed.
"""

from bilevel_profiling.forecasting.advice import Advice as Advice
from bilevel_profiling.forecasting.advice import recommend as recommend
from bilevel_profiling.forecasting.fake import ForecastError as ForecastError
from bilevel_profiling.forecasting.fake import forecast as forecast
from bilevel_profiling.forecasting.search import Fit as Fit
from bilevel_profiling.forecasting.search import NotMonotone as NotMonotone
from bilevel_profiling.forecasting.search import fit as fit
from bilevel_profiling.forecasting.search import largest_fit as largest_fit
