"""A loop's state as a dict, and back: everything that its next step depends on."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bilevel.estimators.base import Estimator
from bilevel.loop import plain
from bilevel.loop.identity import described, differences
from bilevel.loop.randomness import Drawn, Randomness, parts_of
from bilevel.loop.reader import Reader
from bilevel.loop.stepping import Carried, Stepping
from bilevel.space import tree
from bilevel.space.shards import Sharding
from bilevel.space.tree import Tree

FORMAT, VERSION = "bilevel.OuterLoop", 1


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a loop is made of, and `settings`: what it was made with, by name, for comparison with a file's."""

    stepping: Stepping
    reader: Reader
    random: Randomness
    also: Mapping[str, Any]
    settings: Mapping[str, str]

    @property
    def device(self) -> torch.device:
        """Where the problem is."""
        return tree.tensors(self.stepping.outer)[0].device

    def state_dict(self, carried: Carried, index: int) -> dict[str, Any]:
        """Copies of everything; tensors stay on their devices.

        Raises:
            TypeError: something is no tensor, number, string or container of these.
        """
        stepping, state = self.stepping, carried.state
        names, others = held(stepping.optimizer, stepping.outer)
        saved = {
            "format": FORMAT,
            "version": VERSION,
            "torch": str(torch.__version__),
            "settings": dict(self.settings),
            "index": index,
            "outer": plain.saved_tree(stepping.outer),
            "held": names,
            "others": others,
            "inner": plain.saved_tree(carried.inner),
            "part": part_of(carried.inner, stepping.estimator),
            "state": state,
            "on_host": plain.on_host(state, self.device),
            "optimizer": stepping.optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in stepping.schedulers],
            "also": {name: value.state_dict() for name, value in self.also.items()},
            "data": self.reader.state_dict(),
            "random": self.random.peek().to_dict(),
            "generators": self.random.kinds(),
        }
        return {name: plain.copied(value, name) for name, value in saved.items()}

    def check(self, saved: Any, inner: Tree | None) -> None:
        """Compare a state with what is at hand, before anything is changed.

        Raises:
            TypeError, ValueError: it cannot be loaded into this loop.

        Warns:
            UserWarning: settings differ.
        """
        if not isinstance(saved, Mapping) or saved.get("format") != FORMAT:
            raise TypeError(
                "OuterLoop was given a state that is none of its own; what its state_dict() gave, or a file of its "
                "save(), was needed"
            )
        if saved["version"] != VERSION:
            raise ValueError(
                f"OuterLoop was given a state of version {saved['version']}; this library reads version {VERSION}. "
                f"Load it with the library that saved it"
            )
        names, others = held(self.stepping.optimizer, self.stepping.outer)
        _check_part(saved.get("part"), part_of(inner, self.stepping.estimator))
        plain.loaded_tree("outer variable", self.stepping.outer, saved["outer"])
        plain.loaded_tree("inner variable", inner, saved["inner"])
        _same("the tensors of its optimizer, in groups and in this order,", saved["held"], names)
        shapes = [[tuple(x.shape) for x in each] for each in (saved["others"], others)]
        _same("other tensors in its optimizer, of shapes", *shapes)
        _same("the optimizer", saved["settings"]["optimizer"], self.settings["optimizer"])
        _same("the schedulers", *(_kinds(each, "scheduler[") for each in (saved["settings"], self.settings)))
        _same("the names in also", sorted(saved["also"]), sorted(self.also))
        _same("the generators", saved["generators"], self.random.kinds())
        data, epochs = saved["data"], self.reader.epochs
        if epochs is not None and data["epoch"] >= epochs and not data["over"]:
            raise ValueError(
                f"OuterLoop was saved in pass {data['epoch']} of its data, counted from 0, and is to make {epochs}: it "
                f"would be over at once. Give it epochs={data['epoch'] + 1} or more, or None. Nothing was loaded"
            )
        if saved["state"] is not None:
            _same("a state of the estimator", saved["settings"]["estimator"], self.settings["estimator"])
        if differ := differences(saved["settings"], self.settings):
            warnings.warn(
                f"OuterLoop was saved with other settings than it is loaded with, so it will not go on as it would "
                f"have: {'; '.join(differ)}. Those of the optimizer and of schedulers are the file's from now on, all "
                f"others are those of now",
                stacklevel=4,
            )
        devices = len(saved["random"]["cuda"])
        if self.device.type == "cuda" and devices != torch.cuda.device_count():
            warnings.warn(
                f"OuterLoop was saved with the generators of {devices} CUDA devices, and is loaded where there are "
                f"{torch.cuda.device_count()}; random numbers on a device without one will be others",
                stacklevel=4,
            )

    def go_to(self, saved: Mapping[str, Any]) -> None:
        """Bring the loader to its place; the generators stay.

        Raises:
            ValueError: it cannot be got there.
        """
        now = self.random.peek()
        try:
            self.reader.load_state_dict(saved["data"])
        finally:
            self.random.set(now)

    def take_over(self, saved: Mapping[str, Any], inner: Tree | None) -> Carried:
        """Take over all else of a state that was checked; `inner` is a tree like the saved one."""
        stepping = self.stepping
        outer = plain.loaded_tree("outer variable", stepping.outer, saved["outer"])
        leaves = plain.loaded_tree("inner variable", inner, saved["inner"])
        for name, value in self.also.items():
            value.load_state_dict(plain.copied(saved["also"][name], name))
        for scheduler, state in zip(stepping.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(plain.copied(state, "schedulers"))
        _load_optimizer(stepping.optimizer, plain.copied(saved["optimizer"], "optimizer"))
        assert outer is not None, "an outer variable there is"
        with torch.no_grad():
            xs = [*tree.tensors(stepping.outer), *held(stepping.optimizer, stepping.outer)[1]]
            for x, value in zip(xs, [*outer, *saved["others"]], strict=True):
                x.copy_(value)
        if leaves is not None:
            inner = tree.like(inner, [leaf.to(self.device, copy=True) for leaf in leaves])
        self.random.set(Drawn.from_dict(saved["random"]))
        return Carried(inner, plain.placed(saved["state"], self.device, saved["on_host"]))


def part_of(inner: Tree | None, estimator: Estimator) -> list[int] | None:
    """This rank, and how many there are, where an inner variable or its tasks are split over ranks."""
    sharding = None if inner is None else Sharding.of("OuterLoop", inner)
    company = getattr(estimator, "company", None)  # (of a stranger's estimator there may be none)
    ranks = getattr(company, "ranks", None) if sharding is None else sharding.ranks
    return None if ranks is None else [ranks.rank, ranks.size]


def _check_part(before: list[int] | None, now: list[int] | None) -> None:
    if before != now:
        had, have = (
            "an inner variable that is whole"
            if part is None
            else f"the part of an inner variable or of its tasks that rank {part[0]} of {part[1]} has"
            for part in (before, now)
        )
        raise ValueError(
            f"OuterLoop was saved with {had}, and is loaded with {have}: each rank loads the file that it saved, in a "
            f"run of as many ranks. Nothing was loaded"
        )


def settings(stepping: Stepping, loader: Any) -> dict[str, str]:
    """What a loop was made with, by name."""
    device = tree.tensors(stepping.outer)[0].device.type
    found = {"loader": _name(loader), "optimizer": _wrapped(stepping.optimizer), "device": device}
    for part in parts_of(loader):
        if isinstance(dtype := getattr(part, "dtype", None), torch.dtype):
            found["loader.dtype"] = repr(dtype)
    for name in ("problem", "solver", "estimator", "engine", "carry", "tolerate", "accumulate", "clip"):
        found |= described(name, getattr(stepping, name))
    for name, value in stepping.optimizer.defaults.items():
        found |= described(f"optimizer.{name}", value)
    found |= _of_groups(stepping.optimizer) | _of_projections(stepping.optimizer)
    for place, scheduler in enumerate(stepping.schedulers):
        where = f"scheduler[{place}]"
        found |= described(f"{where}.state_dict()", scheduler.state_dict()) | {where: _name(scheduler)}
    return found


def held(optimizer: Optimizer, outer: Tree) -> tuple[list[list[str]], list[Tensor]]:
    """The names of the tensors in each of the optimizer's groups, and those of its tensors that are not in outer."""
    known: dict[int, str] = {}
    for name, x in zip(tree.names(outer), tree.tensors(outer), strict=True):
        known.setdefault(id(x), name)
    groups, others = list[list[str]](), list[Tensor]()
    for group in optimizer.param_groups:
        groups.append([known.get(id(x), "(not in outer)") for x in group["params"]])
        others += [x for x in group["params"] if id(x) not in known]
    return groups, others


def _name(value: Any) -> str:
    return type(value).__name__


def _wrapped(optimizer: Optimizer) -> str:
    """Its name, and that of the one that it holds."""
    inside = getattr(optimizer, "optimizer", None)
    return _name(optimizer) + (f" of {_wrapped(inside)}" if isinstance(inside, Optimizer) else "")


def _of_groups(optimizer: Optimizer) -> dict[str, str]:
    """The settings of several groups."""
    if len(optimizer.param_groups) == 1:
        return {}
    return {
        key: text
        for place, group in enumerate(optimizer.param_groups)
        for name in optimizer.defaults
        for key, text in described(f"optimizer.param_groups[{place}][{name!r}]", group.get(name)).items()
    }


def _of_projections(optimizer: Optimizer) -> dict[str, str]:
    """The sets on which an optimizer puts its tensors back, in their order."""
    found = getattr(optimizer, "projections", None)
    return (
        {}
        if found is None
        else described("optimizer.projections", [*found.values()] if isinstance(found, Mapping) else found)
    )


def _kinds(found: Mapping[str, str], start: str) -> list[str]:
    return [text for name, text in found.items() if name.startswith(start) and name.endswith("]") and "." not in name]


def _same(what: str, before: Any, now: Any) -> None:
    if before != now:
        raise ValueError(
            f"OuterLoop was saved with {what} {before}, and has {now}; it must be made as it was then. Nothing was "
            f"loaded"
        )


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Its own load_state_dict, without its conversions: what was float32 beside a bfloat16 tensor stays so."""
    kept = plain.copied(saved["state"], "optimizer")
    optimizer.load_state_dict(saved)
    xs = [x for group in optimizer.param_groups for x in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for x, number in zip(xs, numbers, strict=True):
        for name, value in kept.get(number, {}).items():
            now = optimizer.state[x].get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and value.dtype != now.dtype:
                optimizer.state[x][name] = value.to(now.device)
