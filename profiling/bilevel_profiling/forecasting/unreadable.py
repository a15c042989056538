"""Errors of code that reads a tensor's value, told so that their cause can be mended."""

import contextlib
import linecache
from collections.abc import Iterator

from torch._subclasses import fake_tensor

from bilevel_profiling.meters.origin import users_file

_VALUE = "needs the value of a tensor"
_SIZE = "makes a tensor whose size depends on values"
_REMEDIES = {
    _VALUE: "Keep it a tensor (torch.where(condition, a, b) instead of if; no .item(), .tolist(), float() or "
    ".numpy() of a tensor; num_classes for one_hot)",
    _SIZE: "Keep sizes fixed (torch.where(mask, a, 0) or a weighted mean instead of a[mask] or nonzero(); "
    "repeat_interleave with output_size)",
}
_UNSUPPORTED = (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException)


class ForecastError(RuntimeError):
    """The code cannot be followed on tensors without data; the message names the line and says what to write."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn an error that comes from reading a fake tensor into a ForecastError; a note is put on any other.

    Raises:
        ForecastError: naming the line that reads.
    """
    try:
        yield
    except ForecastError:
        raise
    except Exception as error:
        what = _reads(error)
        if what is None:
            error.add_note(
                "This happened in a forecast, which runs on tensors without data; measure() runs on real ones."
            )
            raise
        raise ForecastError(
            f"{_where(error)} {what}, and a forecast runs on tensors without data. "
            f"{_REMEDIES.get(what, 'Use another operator')}; or use measure(), which runs on real data."
        ) from error


def _reads(error: Exception) -> str | None:
    """What the code did to a fake tensor; None if that is not what went wrong."""
    if isinstance(error, fake_tensor.DynamicOutputShapeException):
        return _SIZE
    if isinstance(error, _UNSUPPORTED):
        return f"uses an operator that torch knows no shapes for ({' '.join(str(error).split())[:200]})"
    text = str(error)
    if "no fake impl registered" in text or "register_fake" in text:
        return "uses a custom operator that says nothing about shapes (torch.library.register_fake tells them)"
    if isinstance(error, fake_tensor.DataDependentOutputException):
        return _VALUE
    if isinstance(error, RuntimeError) and (
        ".numpy() is not supported for tensor subclasses" in text or "vmap over calling .item()" in text
    ):
        return _VALUE
    return _VALUE if isinstance(error, TypeError) and "FakeTensor" in text else None


def _where(error: Exception) -> str:
    """File, line and text of the innermost line that is the user's."""
    found, trace = "The code", error.__traceback__
    while trace is not None:
        name = users_file(trace.tb_frame.f_code.co_filename)
        if name:
            text = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
            found = f"{name}:{trace.tb_lineno}" + (f" ({text})" if text else "")
        trace = trace.tb_next
    return found
