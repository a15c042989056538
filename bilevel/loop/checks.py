"""What a loop is made with, checked once."""

import inspect
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bilevel.hypergradient import check_kind, check_movable
from bilevel.loop.early_stopping import EarlyStopping
from bilevel.loop.mixed_precision import MixedPrecision
from bilevel.loop.precision_check import PrecisionCheck
from bilevel.space import tree
from bilevel.space.tree import Tree


def check_optimizer(who: str, outer: Tree, optimizer: Any) -> None:
    """Raise TypeError or ValueError unless `optimizer` moves `outer`, a step at a time."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{who}() was given a {type(optimizer).__name__} as optimizer; a torch.optim optimizer over outer was "
            f"needed, such as torch.optim.Adam(outer.values(), lr=0.01) (bilevel.SGD and its kin are for the inner "
            f"variable)"
        )
    if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"{who}() was given {type(optimizer).__name__} as optimizer, whose step needs a closure that evaluates "
            f"the loss again; {who}() makes one hypergradient a step. Use torch.optim.Adam or SGD, or call "
            f"hypergradient() and set_grad() in a closure of your own"
        )
    check_movable(outer)
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if not any(id(x) in held for x in tree.tensors(outer)):
        raise ValueError(
            f"{who}() was given an optimizer that holds none of the tensors of outer, so outer would never move; make "
            f"it over outer.values()"
        )


def check_options(who: str, loader: Any, epochs: Any, accumulate: Any, clip: Any, also: Any) -> None:
    """Raise TypeError or ValueError unless these are what a loop can be made with."""
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"{who}() was given a {type(loader).__name__} as loader; an iterable of Batches was needed")
    for name, value in (("epochs", 1 if epochs is None else epochs), ("accumulate", accumulate)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{who}() was given {name}={value!r}; an integer of at least 1 was needed")
    if epochs != 1 and hasattr(loader, "__next__"):
        raise ValueError(
            f"{who}() was given epochs={epochs} and a {type(loader).__name__}, which can be read only once; give a "
            f"list, a DataLoader or an object with __iter__, or leave epochs out"
        )
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool)
    if clip is not None and not callable(clip) and not (number and clip > 0):
        raise ValueError(
            f"{who}() was given clip={clip!r}; None, a norm above 0 or a function of the list of outer tensors was "
            f"needed"
        )
    if also is not None and not isinstance(also, Mapping):
        raise TypeError(f"{who}() was given a {type(also).__name__} as also; a dict of objects by name was needed")
    for name, value in (also or {}).items():
        if not isinstance(name, str) or not all(hasattr(value, each) for each in ("state_dict", "load_state_dict")):
            raise TypeError(
                f"{who}() was given also={{{name!r}: a {type(value).__name__}}}; objects with state_dict and "
                f"load_state_dict were needed, by names that are strings"
            )


def check_objects(who: str, precision: Any, check: Any, stop: Any) -> None:
    """Raise TypeError unless these are None or of their kinds."""
    for name, value, kind, write in (
        ("precision", precision, MixedPrecision, "bilevel.loop.MixedPrecision(torch.bfloat16)"),
        ("check", check, PrecisionCheck, "bilevel.loop.PrecisionCheck(every=100)"),
        ("stop", stop, EarlyStopping, "bilevel.loop.EarlyStopping(patience=10)"),
    ):
        if value is not None:
            check_kind(who, name, value, kind, write)


def check_saving(folder: Any, keep: Any) -> None:
    """Raise ValueError unless files can be saved there, and so many kept."""
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
        raise ValueError(f"OuterLoop.save() was given keep={keep!r}; an integer of at least 1, or None, was needed")
    path = pathlib.Path(folder)
    if path.is_file() or path.suffix in (".pt", ".pth", ".ckpt"):
        other = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-steps")
        raise ValueError(
            f"OuterLoop.save() was given {str(path)!r}; a folder was needed, in which each save is a new file: write "
            f"save({str(other)!r})"
        )


def schedulers(who: str, given: Any, optimizer: Optimizer) -> tuple[LRScheduler, ...]:
    """The schedulers as a tuple.

    Raises:
        TypeError: one is none.
        ValueError: one is of another optimizer.
    """
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    for scheduler in found:
        if not isinstance(scheduler, LRScheduler):
            raise TypeError(
                f"{who}() was given a {type(scheduler).__name__} as scheduler; one of torch.optim.lr_scheduler was "
                f"needed, or a list of them"
            )
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError(
                f"{who}() was given a {type(scheduler).__name__} of another optimizer; make it with the one that is "
                f"given to the loop"
            )
    return found
