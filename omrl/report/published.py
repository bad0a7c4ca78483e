"""Published numbers, to stand beside ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
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

    @property
    def label(self) -> str:
        """The citation without authors and year, to stand in a field."""
        return re.sub(r" \(.*?\)", "", self.citation)


@dataclass(frozen=True)
class Quote:
    """What was published of one cell.

    Attributes:
        quantity: see ``Published``.
        value: of it.
        spread: its standard deviation; None where the paper gives none.
        sources: the tables that have it; several where one copies another.
    """

    quantity: str
    value: float
    spread: float | None
    sources: tuple[Published, ...]

    @property
    def text(self) -> str:
        """The value with its spread."""
        digits = 2 if self.quantity == "return" else 3
        return f"{self.value:.{digits}f}" + ("" if self.spread is None else f" ± {self.spread:.{digits}f}")

    @property
    def labels(self) -> str:
        """The sources, short."""
        return ", ".join(source.label for source in self.sources)


def quotes(tables: Sequence[Published], cell: tuple[str, str, str]) -> tuple[Quote, ...]:
    """Return what ``tables`` say of a cell, in their order; the same number of two tables once."""
    found: dict[tuple[str, float, float | None], tuple[Published, ...]] = {}
    for table in tables:
        if cell in table.values:
            key = table.quantity, table.values[cell], table.spread.get(cell)
            found[key] = (*found.get(key, ()), table)
    return tuple(Quote(*key, sources) for key, sources in found.items())


def _table_1(env: str, dataset: str, values: list[float], spread: list[float], note: str) -> Published:
    names = ["focal", "contrastive", "batch-wise", "sequence-wise", "focalpp"]
    return Published(
        f"FOCAL++ (Li et al., 2022), Table 1, {env}",
        {(name, dataset, dataset): value for name, value in zip(names, values, strict=True)},
        {(name, dataset, dataset): value for name, value in zip(names, spread, strict=True)},
        note,
    )


_UNICORN = "Six seeds, 20 test tasks, 200,000 updates, data of its own: where the field is, not what these data allow."


def _unicorn(env: str, values: dict[str, tuple[float, float]]) -> Published:
    return Published(
        f"UNICORN (Li et al., 2024), Table 2, {env}, contexts of the tasks' own policies",
        {(name, "mixed", "mixed"): value for name, (value, _) in values.items()},
        {(name, "mixed", "mixed"): spread for name, (_, spread) in values.items()},
        _UNICORN,
    )


def _unicorn_levels(values: dict[str, list[tuple[float, float]]]) -> Published:
    """Return its table of data qualities: beside levels called as it calls them, and beside parts of a SAC run."""
    levels = [("random", "early"), ("medium", "middle"), ("expert", "late")]
    cells = {
        (name, ours, ours): cell
        for name, row in values.items()
        for alike, cell in zip(levels, row, strict=True)
        for ours in alike
    }
    return Published(
        "UNICORN (Li et al., 2024), Table 3, Ant-Dir, contexts of the tasks' own policies",
        {key: value for key, (value, _) in cells.items()},
        {key: spread for key, (_, spread) in cells.items()},
        f"{_UNICORN} Beside early, middle and late stand its random, medium and expert.",
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
    "focalpp-table-1-point": _table_1(
        "Sparse-Point-Robot",
        "step-mixed",
        [11.84, 12.53, 12.54, 12.64, 12.96],
        [1.05, 0.31, 0.23, 0.14, 0.09],
        "The quality of data behind it is not stated; baselines are in Fig. 4 only.",
    ),
    "focalpp-table-1-wind": _table_1(
        "Point-Robot-Wind",
        "mixed",
        [-5.61, -5.78, -5.57, -5.09, -5.39],
        [0.59, 0.44, 0.34, 0.01, 0.57],
        "The published split into training and test winds is random and unseeded: ten random winds alone vary by "
        "0.48, and a controller that ignores the wind has -5.46 on average over all 50.",
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
            (power, mixed, mixed): esr
            for mixed in ("mixed", "step-mixed")
            for power, esr in {"focal": 0.861, "inverse": 0.840, "linear": 0.819, "square": 0.506}.items()
        },
        {},
        "ESR: the share of training-task pairs farther apart than two random points of the cube.",
        "esr",
    ),
    "focalpp-table-1-sparse-cheetah-dir": _table_1(
        "Sparse-Cheetah-Dir",
        "mixed",
        [1351.40, 1309.76, 1330.56, 1293.40, 1470.52],
        [90.46, 115.33, 162.03, 129.99, 68.29],
        "Three seeds, data of its own; the sparse reward starts at 6 per step.",
    ),
    "focalpp-table-1-sparse-ant-dir": _table_1(
        "Sparse-Ant-Dir",
        "mixed",
        [429.92, 504.00, 687.37, 573.26, 719.77],
        [41.52, 145.80, 85.95, 186.22, 57.58],
        "Three seeds, data of its own; the sparse reward starts at 3 per step.",
    ),
    "focalpp-table-1-sparse-cheetah-vel": _table_1(
        "Sparse-Cheetah-Vel",
        "mixed",
        [-183.32, -158.95, -150.58, -140.63, -137.31],
        [40.16, 21.36, 11.75, 11.52, 7.06],
        "Three seeds, 80 velocities to train on, data of its own; the sparse reward starts at -0.1 per step.",
    ),
    "focalpp-table-1-walker": _table_1(
        "Walker-2D-Params",
        "mixed",
        [302.70, 366.35, 376.52, 375.67, 391.02],
        [12.94, 55.08, 36.59, 45.72, 42.44],
        "20 bodies to train on, 5 to test, which were drawn unseeded.",
    ),
    "unicorn-table-2-cheetah-dir": _unicorn(
        "Half-Cheetah-Dir",
        {
            "unicorn": (1307, 26),
            "csro": (1180, 228),
            "focal": (1186, 272),
            "macaw": (1155, 10),
            "prompt-dt": (1176, 40),
        },
    ),
    "unicorn-table-2-cheetah-vel": _unicorn(
        "Half-Cheetah-Vel",
        {"unicorn": (-22, 1), "csro": (-28, 1), "focal": (-22, 1), "macaw": (-56, 2), "prompt-dt": (-118, 66)},
    ),
    "unicorn-table-2-walker": _unicorn(
        "Walker-2D-Params",
        {"unicorn": (419, 44), "csro": (310, 58), "focal": (308, 98), "macaw": (141, 9), "prompt-dt": (185, 9)},
    ),
    "unicorn-table-2-hopper": _unicorn(
        "Hopper-Rand-Params",
        {"unicorn": (316, 6), "csro": (310, 6), "focal": (302, 4), "macaw": (218, 6), "prompt-dt": (234, 5)},
    ),
    "unicorn-table-2-ant-dir": _unicorn(
        "Ant-Dir",
        {"unicorn": (267, 14), "csro": (276, 19), "focal": (217, 29), "macaw": (26, 3), "prompt-dt": (1, 0)},
    ),
    "unicorn-table-3-ant-dir": _unicorn_levels(
        {
            "unicorn": [(81, 18), (220, 23), (279, 10)],
            "csro": [(2, 3), (166, 10), (252, 39)],
            "focal": [(67, 26), (171, 84), (229, 42)],
        },
    ),
}
