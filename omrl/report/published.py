"""Published numbers, to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published table, or the part of it that one pipeline can be compared with.

    Attributes:
        citation: where the numbers stand.
        values: (algorithm, train dataset, test dataset) -> mean return.
        spread: the same -> published standard deviation, where there is one.
        note: what to keep in mind when comparing.
        quantity: what the values are: ``return``, or a diagnostic such as ``esr``.
    """

    citation: str
    values: dict[tuple[str, str, str], float]
    spread: dict[tuple[str, str, str], float]
    note: str
    quantity: str = "return"


def _table_1(dataset: str, values: list[float], spread: list[float], note: str) -> Published:
    names = ["focal", "contrastive", "batch-wise", "sequence-wise", "focalpp"]
    return Published(
        "FOCAL++ (Li et al., 2022), Table 1",
        {(name, dataset, dataset): value for name, value in zip(names, values, strict=True)},
        {(name, dataset, dataset): value for name, value in zip(names, spread, strict=True)},
        note,
    )


TABLES = {
    "focal-table-6": Published(
        "FOCAL (Li et al., ICLR 2021), Table 6",
        {
            ("focal", "step-4800", "step-4800"): 8.16,
            ("focal", "step-3000", "step-3000"): 8.44,
            ("focal", "step-2200", "step-2200"): 2.34,
            ("focal", "step-4800", "step-3000"): 7.12,
            ("focal", "step-4800", "step-2200"): 4.43,
            ("focal", "step-3000", "step-4800"): 8.25,
            ("focal", "step-3000", "step-2200"): 6.76,
        },
        {},
        "FOCAL++ (2022), Table 1, gives 11.84 for FOCAL on the same environment.",
    ),
    "focalpp-table-1-point-robot-wind": Published(
        "FOCAL++ (Li et al., 2022), Table 1, Point-Robot-Wind",
        {("focal", "expert", "expert"): -5.61},
        {("focal", "expert", "expert"): 0.59},
        "The published split into training and test winds is random and unseeded; 10 random winds alone vary by "
        "0.48, and a controller that ignores the wind has -5.46 on average over all 50.",
    ),
    "focalpp-table-1-sparse-point-robot": Published(
        "FOCAL++ (Li et al., 2022), Table 1, Sparse-Point-Robot",
        {("focal", "expert", "expert"): 11.84},
        {("focal", "expert", "expert"): 1.05},
        "FOCAL (ICLR 2021), Table 6, gives 8.16 for the same setting.",
    ),
    "focalpp-table-1-point": _table_1(
        "step-mixed",
        [11.84, 12.53, 12.54, 12.64, 12.96],
        [1.05, 0.31, 0.23, 0.14, 0.09],
        "Sparse-Point-Robot; the quality of data behind it is not stated. Baselines are in Fig. 4 only.",
    ),
    "focalpp-table-1-wind": _table_1(
        "mixed",
        [-5.61, -5.78, -5.57, -5.09, -5.39],
        [0.59, 0.44, 0.34, 0.01, 0.57],
        "Point-Robot-Wind; the published split into training and test winds is random and unseeded: ten random winds "
        "alone vary by 0.48, and a controller that ignores the wind has -5.46 on average over all 50.",
    ),
    "focalpp-table-3-point": Published(
        "FOCAL++ (Li et al., 2022), Table 3",
        {
            ("focal", "step-4800", "step-4800"): 8.16,
            ("focal", "step-4800", "step-3000"): 7.12,
            ("focal", "step-4800", "step-2200"): 4.43,
            ("focal", "step-3000", "step-3000"): 8.44,
            ("focal", "step-3000", "step-4800"): 8.25,
            ("focal", "step-3000", "step-2200"): 6.76,
            ("focalpp", "step-4800", "step-4800"): 12.60,
            ("focalpp", "step-4800", "step-3000"): 12.47,
            ("focalpp", "step-4800", "step-2200"): 10.17,
            ("focalpp", "step-3000", "step-3000"): 12.54,
            ("focalpp", "step-3000", "step-4800"): 12.44,
            ("focalpp", "step-3000", "step-2200"): 10.49,
        },
        {},
        "Its FOCAL column is copied from FOCAL Table 6, of an older setting; its own Table 1 has 11.84 for FOCAL.",
    ),
    "focal-table-1": Published(
        "FOCAL (Li et al., ICLR 2021), Table 1, Half-Cheetah-Vel, one seed",
        {
            ("inverse-square", "step-mixed", "step-mixed"): 0.861,
            ("inverse", "step-mixed", "step-mixed"): 0.840,
            ("linear", "step-mixed", "step-mixed"): 0.819,
            ("square", "step-mixed", "step-mixed"): 0.506,
        },
        {},
        "ESR: the share of training-task pairs farther apart than two random points of the cube.",
        "esr",
    ),
}
