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
    """

    citation: str
    values: dict[tuple[str, str, str], float]
    spread: dict[tuple[str, str, str], float]
    note: str


TABLES = {
    "focal-table-6": Published(
        "FOCAL (Li et al., ICLR 2021), Table 6",
        {
            ("focal", "expert", "expert"): 8.16,
            ("focal", "medium", "medium"): 8.44,
            ("focal", "random", "random"): 2.34,
            ("focal", "expert", "medium"): 7.12,
            ("focal", "expert", "random"): 4.43,
            ("focal", "medium", "expert"): 8.25,
            ("focal", "medium", "random"): 6.76,
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
}
