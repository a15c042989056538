"""Who made a tensor: the operator, the innermost module, and the line of code. In a backward pass: those of the forward
operation it belongs to.

Autograd numbers its nodes in the order in which they are made, so the node that a backward pass is at leads back to the
operation that made it; a node made during a backward pass (a double backward) leads back the same way, down to the
user's own line.
"""

import os
import sys
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import nn

import bilevel


class Place(NamedTuple):
    """Where in the user's code something was made."""

    module: str
    line: str
    backward: bool = False


class Places:
    """Names the place of each operation, as it runs, inside a `with` block.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
        >>> with Places() as places:
        ...     hook = net[0].register_forward_pre_hook(lambda *_: print(places.here(None).module))
        ...     _ = net(torch.ones(1, 2))
        Sequential.0
    """

    def __init__(self) -> None:
        self._modules: list[str] = []
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._inside: list[weakref.ref[nn.Module]] = []
        self._of_node: dict[int, Place] = {}
        self._first = 0

    def __enter__(self) -> Self:
        self._first = torch._C._autograd._get_sequence_nr()
        self._hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._entered),
            nn.modules.module.register_module_forward_hook(self._left, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._of_node.clear()

    def here(self, node: int | None) -> Place:
        """The place of the operation that runs now.

        Args:
            node: the number of the autograd node that a backward pass is at; None outside of one.
        """
        if node is None:
            place = Place(self._modules[-1] if self._modules else "", _line())
        else:
            made = self._of_node.get(node)
            place = Place("", _line(), True) if made is None else made._replace(backward=True)
        # The node of this operation was made just before the operation ran; later operations of the same node find the
        # entry taken.
        number = torch._C._autograd._get_sequence_nr() - 1
        if number >= self._first:  # else it was made before the block, and nobody knows where
            self._of_node.setdefault(number, place)
        return place

    def _entered(self, module: nn.Module, arguments: Any) -> None:
        if module not in self._names:
            self._names[module] = self._path(module)
        self._modules.append(self._names[module])
        self._inside.append(weakref.ref(module))

    def _left(self, module: nn.Module, arguments: Any, output: Any) -> None:
        while self._inside:
            self._modules.pop()
            if self._inside.pop()() is module:  # a KeyboardInterrupt leaves modules on the stack that were never left
                break

    def _path(self, module: nn.Module) -> str:
        parent = self._inside[-1]() if self._inside else None
        if parent is not None:
            for name, child in parent.named_modules():
                if child is module and name:
                    return f"{self._modules[-1]}.{name}"
        return type(module).__name__


def node() -> Any:
    """The autograd node that a backward pass is at; None outside of one."""
    return None if torch._C._current_graph_task_id() == -1 else torch._C._current_autograd_node()


def of_the_engine() -> bool:
    """Whether the operator that runs is autograd's own, and not in a user's backward or hook that the backward pass
    calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "_engine_run_backward":
            return True
        if users_file(frame.f_code.co_filename):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def operator_name(operator: Any) -> str:
    """The name of an operator without its overload, such as aten.mm."""
    name = _operators.get(operator)
    if name is None:
        name = _operators[operator] = (
            operator._schema.name.replace("::", ".") if hasattr(operator, "_schema") else str(operator)
        )
    return name


_operators: dict[Any, str] = {}
_LIBRARY = str(Path(bilevel.__file__).parent) + os.sep
# Frames between a user's function, or an algorithm of ours, and the operator: never the answer to "who made this".
_BETWEEN = (
    str(Path(torch.__file__).parent) + os.sep,
    str(Path(__file__).parents[1]) + os.sep,
    *(f"{_LIBRARY}{name}.py" for name in ("_autodiff", "_tree", "_spans", "functional", "oracles", "problem")),
    "<",
)
_shown: dict[str, str] = {}


def _line() -> str:
    """The innermost frame that is neither torch's nor in between."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        shown = _shown.get(name)
        if shown is None:
            shown = _shown[name] = users_file(name)
        if shown:
            return f"{shown}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def users_file(name: str) -> str:
    """How a file is shown; "" when it is torch's, the profiler's, or one of ours that stands between a user's function
    and the operator.
    """
    if name.startswith(_BETWEEN):
        # What a doctest or an interactive session runs is the user's.
        return name if name.startswith(("<stdin>", "<doctest", "<ipython", "<string>", "<console>", "<input")) else ""
    if name.startswith(_LIBRARY):
        return "bilevel/" + name.removeprefix(_LIBRARY).replace(os.sep, "/")
    path = Path(name)
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return "/".join(path.parts[-2:])
