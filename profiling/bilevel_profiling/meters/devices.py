"""Peak speeds and memories of a few GPUs, from their makers' data sheets as remembered (not measured here), for
rooflines and budgets.

Dense figures: no sparsity. "float32" is without TF32, which torch leaves off for matrix products by default.
"""

import dataclasses
from collections.abc import Mapping

from bilevel_profiling.records.sizes import parse

_HALF = ("float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Device:
    """How fast a device computes and moves data at its best.

    Args:
        name: shown in reports.
        flops: peak FLOP/s of matrix products by dtype ("float32", "bfloat16", ...); one that is missing counts as
            float32.
        bandwidth: bytes/s of its memory.
        memory: bytes.

    Example:
        >>> device = Device("mine", flops={"float32": 10e12}, bandwidth=500e9, memory=16 * 2**30)
        >>> device.seconds(flops=10e12, moved=1e9, dtype="float32")
        1.0
        >>> device.seconds(flops=0, moved=500e9, dtype="float32")
        1.0
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int

    def __post_init__(self) -> None:
        if not self.flops.get("float32", 0) > 0 or not self.bandwidth > 0:
            raise ValueError(
                f"Device {self.name!r} was given flops={dict(self.flops)!r} and bandwidth={self.bandwidth!r}; positive "
                f"numbers, with one for float32, were needed, such as "
                f'Device("A100", flops={{"float32": 19.5e12}}, bandwidth=2.04e12, memory=80 * 2**30)'
            )

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time for so much computing and moving."""
        return max(flops / self.flops.get(dtype, self.flops["float32"]), moved / self.bandwidth)


def _of(name: str, float32: float, half: float, bandwidth: float, memory: str, float64: float | None = None) -> Device:
    return Device(
        name,
        {"float32": float32, "float64": float64 or float32 / 32, **dict.fromkeys(_HALF, half)},
        bandwidth,
        parse(memory),
    )


DEVICES = {
    "t4": _of("T4", 8.1e12, 65e12, 320e9, "16GiB"),
    "v100": _of("V100", 15.7e12, 125e12, 900e9, "32GiB", 7.8e12),
    "rtx3090": _of("RTX 3090", 35.6e12, 71e12, 936e9, "24GiB"),
    "rtx4090": _of("RTX 4090", 82.6e12, 165e12, 1008e9, "24GiB"),
    "l4": _of("L4", 30.3e12, 121e12, 300e9, "24GiB"),
    "a100-40": _of("A100 40 GB", 19.5e12, 312e12, 1555e9, "40GiB", 9.7e12),
    "a100": _of("A100 80 GB", 19.5e12, 312e12, 2039e9, "80GiB", 9.7e12),
    "h100": _of("H100 SXM", 67e12, 989e12, 3350e9, "80GiB", 34e12),
    "h200": _of("H200", 67e12, 989e12, 4800e9, "141GB", 34e12),
}
"""By the name that `bilevel forecast --on` takes."""
