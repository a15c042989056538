"""The generators that a step may draw from, read and set all at once.

torch's on the CPU and on every CUDA device, Python's, numpy's where it is loaded, and those that somebody owns. Each
holds 624 words; reading them takes 70 microseconds in all, and moves none.
"""

import dataclasses
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, Dataset, Sampler

_LOADING = (DataLoader, Sampler, Dataset)
_THROUGH = ("loader", "sampler", "batch_sampler", "dataset")
"""Where a loader's own generators are looked for, beside the loader itself."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Where the generators stood at one moment; `own` in the order of those that are owned."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]
    python: Any
    numpy: Any
    own: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        """For a file: tensors, numbers, strings and containers of these."""
        return {
            "cpu": self.cpu.clone(),
            "cuda": [state.clone() for state in self.cuda],
            "python": _packed(self.python),
            "numpy": _packed(self.numpy),
            "own": [_packed(state) for state in self.own],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Drawn":
        """What `to_dict` wrote."""
        return cls(
            saved["cpu"].clone(),
            tuple(state.clone() for state in saved["cuda"]),
            _unpacked(saved["python"]),
            _unpacked(saved["numpy"]),
            tuple(_unpacked(state) for state in saved["own"]),
        )


class Randomness:
    """All generators, and those that are owned by somebody.

    Args:
        own: `torch.Generator`, `random.Random`, numpy's `Generator` or `RandomState`.

    Raises:
        TypeError: something else.
    """

    def __init__(self, own: Sequence[Any] = ()) -> None:
        for generator in own:
            if _kind(generator) is None:
                raise TypeError(
                    f"OuterLoop was given a {type(generator).__name__} among generators; a torch.Generator, a "
                    f"random.Random or one of numpy's was needed"
                )
        self.own = tuple({id(generator): generator for generator in own}.values())

    def kinds(self) -> list[str]:
        """The types of the owned ones, for comparison with a file."""
        return [str(_kind(generator)) for generator in self.own]

    def peek(self) -> Drawn:
        """Where they stand."""
        numpy = sys.modules.get("numpy")
        with _disable_current_modes():  # a state is real also where tensors are fake, and no meter counts it
            return Drawn(
                torch.get_rng_state(),
                tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
                random.getstate(),
                None if numpy is None else _of_numpy(numpy),
                tuple(_read(generator) for generator in self.own),
            )

    def set(self, drawn: Drawn) -> None:
        """Put them where they stood. CUDA devices that are not here, and numpy where it is not loaded, are left out."""
        numpy = sys.modules.get("numpy")
        with _disable_current_modes():
            torch.set_rng_state(drawn.cpu)
            for device, state in enumerate(drawn.cuda[: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
            random.setstate(drawn.python)
            if numpy is not None and drawn.numpy is not None:
                numpy.random.set_state(drawn.numpy)
            for generator, state in zip(self.own, drawn.own, strict=True):
                _write(generator, state)


def owned_by(loader: Any) -> list[Any]:
    """The generators that a loader, the loaders in it, their samplers and data sets have as attributes, each once."""
    found = [each for part in parts_of(loader) for each in _attributes(part).values() if _kind(each) is not None]
    return list({id(each): each for each in found}.values())


def parts_of(loader: Any) -> list[Any]:
    """A loader, and the loaders, samplers and data sets that it has as attributes, and so on; each once."""
    found: dict[int, Any] = {}
    queue = [loader]
    while queue:
        value = queue.pop(0)
        if id(value) in found:
            continue
        found[id(value)] = value
        for name, part in _attributes(value).items():
            each = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else (part,)
            queue += [one for one in each if isinstance(one, _LOADING)]
            if name in _THROUGH and part is not None:
                queue.append(part)
    return list(found.values())


def _attributes(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


def _kind(generator: Any) -> str | None:
    if isinstance(generator, torch.Generator):
        return f"torch.Generator on {generator.device.type}"
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return "random.Random"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(generator, numpy.random.Generator):
        return f"numpy.random.Generator of {type(generator.bit_generator).__name__}"
    if numpy is not None and isinstance(generator, numpy.random.RandomState):
        return "numpy.random.RandomState"
    return None


def _of_numpy(numpy: Any) -> Any:
    """The state of numpy's global generator, in its short form where it has one, which is read in half the time."""
    kind = getattr(numpy.random, "get_bit_generator", None)  # in older ones it is always this one
    return numpy.random.get_state(legacy=kind is None or type(kind()).__name__ == "MT19937")


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def _write(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


# In a file, words of a generator are a tensor: it holds no arrays, and writes numbers one by one slowly.


def _packed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _packed(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple) and len(value) > 9:
        return {"words": torch.tensor(value, dtype=torch.int64, device="cpu")}
    if isinstance(value, tuple):
        return tuple(_packed(part) for part in value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        numbers = value.tolist()
        words = torch.tensor(numbers, dtype=torch.int64, device="cpu") if len(numbers) > 9 else numbers
        return {"array": words, "dtype": str(value.dtype)}
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_unpacked(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"words"}:
        return tuple(value["words"].tolist())
    if set(value) != {"array", "dtype"}:
        return {key: _unpacked(part) for key, part in value.items()}
    numpy, words = sys.modules.get("numpy"), value["array"]
    numbers = words.tolist() if isinstance(words, Tensor) else words
    return None if numpy is None else numpy.asarray(numbers, dtype=value["dtype"])
