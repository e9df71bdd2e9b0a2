"""Numbers of others, quoted and not reproduced; every one has its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["QUOTED", "REPORTED", "Quotation"]

# (data set, teacher, student, method): accuracy in percent. Zagoruyko, Komodakis, ICLR 2017, 200 epochs. [paper]
REPORTED = {
    ("cifar10", "", "wrn-16-2", "teacher"): 93.69,
    ("cifar10", "", "wrn-16-1", "alone"): 91.23,
    ("cifar10", "wrn-16-2", "wrn-16-1", "at"): 92.07,
}


@dataclass(frozen=True)
class Quotation:
    """Numbers of others about one teacher and student.

    Attributes:
        data: the data set.
        networks: teacher and student.
        measure: "accuracy" or "error"; in percent.
        numbers: by method, as in `plots.STUDENTS`; of an error top-1 and top-5.
        source: who reports them.
        digits: after the point, as they are reported.
    """

    data: str
    networks: str
    measure: str
    numbers: Mapping[str, tuple[float, ...]]
    source: str
    digits: int = 2

    @property
    def gains(self) -> dict[str, float]:
        """What each method gains over the student alone, percentage points of (top-1) accuracy."""
        sign = 1 if self.measure == "accuracy" else -1
        others = {m: n[0] for m, n in self.numbers.items() if m not in ("teacher", "alone")}
        alone = self.numbers.get("alone")
        return {} if alone is None else {m: round(sign * (n - alone[0]), 2) for m, n in others.items()}


_ZOO = (
    'README of AberHu/Knowledge-Distillation-Zoo, which warns: "hyper-parameters not chosen carefully ... do not '
    'reflect which method is better"'
)
QUOTED = (
    Quotation(
        "CIFAR-10", "WRN-16-2 to WRN-16-1", "accuracy", {"teacher": (93.69,), "alone": (91.23,), "at": (92.07,)},
        "AT's paper, 200 epochs",
    ),
    Quotation(
        "CIFAR-100", "WRN-40-2 to WRN-16-2", "accuracy",
        {"alone": (73.26,), "kd": (74.92,), "at": (74.08,), "nst": (73.68,)}, "README of HobbitLong/RepDistiller",
    ),
    Quotation(
        "CIFAR-10", "ResNet-110 to ResNet-20", "accuracy",
        {"alone": (92.37,), "kd": (92.82,), "at": (93.21,), "nst": (92.83,)}, _ZOO,
    ),
    Quotation(
        "ImageNet", "ResNet-34 to ResNet-18", "error", {"alone": (30.4, 10.8), "at": (29.3, 10.0)}, "AT's paper", 1,
    ),
    Quotation(
        "ImageNet", "ResNet-101 to Inception-BN", "error",
        {"alone": (25.74, 8.07), "nst": (24.81, 7.55), "nst-poly+kd": (24.34, 7.11)}, "NST's paper",
    ),
    Quotation(
        "ImageNet", "ResNet-101 to the modified ResNet-50", "error", {"nst-poly+kd": (21.05, 5.56)}, "NST's paper",
    ),
)  # fmt: skip
