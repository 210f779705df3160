"""What is wrong inside the phantom's head: a glioma, and everything else that lights up on one contrast.

Every layer has a soft membership (0..1, partial volume at its border) and one signal for each contrast; layers are
painted over the healthy tissue, later ones on top. Labels follow from the same memberships, so that image and label
cannot disagree. Labels use the MSD convention: 1 oedema, 2 non-enhancing or necrotic core, 3 enhancing tumour.

The look-alikes are there because they are there in patients, and because without them FLAIR alone draws the outline:
each imitates the tumour on one or two contrasts and is told apart by another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from splitpeer.data.phantom.anatomy import Head, HeadPose, SmoothFields, Volume

EDEMA, CORE, ENHANCING = 1, 2, 3

# Signals in the order flair, t1, t1ce, t2; white matter on T1 is 0.80, free water on T2 is 1.00.
Signal = tuple[float, float, float, float]
TISSUE: dict[str, Signal] = {
    "csf": (0.14, 0.18, 0.18, 1.00),
    "grey": (0.61, 0.56, 0.58, 0.58),
    "white": (0.48, 0.80, 0.81, 0.42),
}
LESION: dict[str, Signal] = {
    "edema": (0.87, 0.66, 0.67, 0.79),
    "infiltration": (0.74, 0.54, 0.56, 0.67),  # solid tumour that does not enhance: cells, less water
    "necrosis": (0.50, 0.30, 0.32, 0.93),
    "rim": (0.74, 0.54, 1.05, 0.68),
    "blood": (0.62, 0.98, 1.03, 0.60),  # methaemoglobin: bright before contrast too
    # Look-alikes.
    "gliosis": (0.86, 0.74, 0.76, 0.46),  # old scar: bright on FLAIR, hardly on T2
    "cyst": (0.16, 0.24, 0.24, 0.98),  # free water: suppressed on FLAIR
    "spaces": (0.48, 0.68, 0.69, 0.76),  # a field of perivascular spaces: T2 alone
    "demyelination": (0.54, 0.58, 0.60, 0.50),  # dark on T1 and T1Gd
    "vessel": (0.55, 0.60, 1.05, 0.50),  # takes up contrast without being tumour
}


@dataclass(frozen=True)
class Textures:
    """Random fields shared by all borders and insides of one patient (correlation lengths in mm)."""

    coarse: Volume  # 15: lobes
    fine: Volume  # 7: frayed borders
    rim: Volume  # 10: thickness of the rim, reach of the oedema

    @classmethod
    def draw(cls, fields: SmoothFields) -> Textures:
        """Three fields over the grid of `fields`."""
        return cls(fields.draw(15.0), fields.draw(7.0), fields.draw(10.0))


@dataclass(frozen=True)
class Glioma:
    """The plan of one tumour, in millimetres; independent of the grid."""

    centre_mm: NDArray[np.float64]
    radius_mm: float
    lobe_offset_mm: NDArray[np.float64]
    lobe_radius_mm: float
    infiltration_offset_mm: NDArray[np.float64]
    infiltration_radius_mm: float
    rim_mm: float
    reach_mm: float  # how far oedema runs along white matter
    bleeds: bool
    faint_on: int | None  # contrast on which the oedema hardly shows: 0 FLAIR, 3 T2

    @classmethod
    def draw(cls, rng: np.random.Generator, centre_mm: NDArray[np.float64]) -> Glioma:
        """A glioma of random size and shape, around `centre_mm`, float64 [3]."""
        radius = float(rng.uniform(10.0, 19.0))
        faint = rng.random()
        return cls(
            centre_mm=centre_mm,
            radius_mm=radius,
            lobe_offset_mm=radius * rng.uniform(0.6, 1.0) * _direction(rng),
            lobe_radius_mm=radius * float(rng.uniform(0.45, 0.8)),
            infiltration_offset_mm=radius * rng.uniform(0.8, 1.2) * _direction(rng),
            infiltration_radius_mm=radius * float(rng.uniform(0.5, 0.9)),
            rim_mm=float(rng.uniform(5.0, 8.0)),
            reach_mm=float(rng.uniform(9.0, 22.0)),
            bleeds=bool(rng.random() < 0.5),
            faint_on=0 if faint < 0.25 else 3 if faint < 0.5 else None,
        )

    @property
    def extent_mm(self) -> float:
        """Beyond this distance from the centre it changes nothing."""
        return 2.2 * self.radius_mm + 1.3 * self.reach_mm + 12.0


@dataclass(frozen=True)
class Lookalike:
    """A healthy or old finding that a careless network takes for tumour."""

    kind: str  # a key of LOOKALIKES
    centre_mm: NDArray[np.float64]
    radius_mm: float
    stretch: NDArray[np.float64]  # factors along x, y, z


# How many of each kind a patient has (at least, at most) and their radii in mm (at least, at most).
LOOKALIKES: dict[str, tuple[int, int, float, float]] = {
    "gliosis": (2, 4, 7.0, 17.0),
    "spaces": (1, 3, 7.0, 15.0),
    "demyelination": (1, 3, 7.0, 15.0),
    "cyst": (1, 3, 5.0, 12.0),
    "blood": (1, 2, 4.0, 9.0),
    "vessel": (2, 3, 4.0, 10.0),
    "walled cyst": (1, 2, 8.0, 13.0),  # a ring after contrast, as a glioma's; but water inside and no oedema
}
WALL_MM = 4.5


def draw_lookalikes(
    rng: np.random.Generator, places_mm: NDArray[np.float64], pose: HeadPose
) -> list[Lookalike]:
    """Look-alikes of every kind at random rows of `places_mm` (n, 3; of the template)."""
    found = []
    for kind, (fewest, most, smallest, largest) in LOOKALIKES.items():
        for _ in range(int(rng.integers(fewest, most + 1))):
            place = pose.to_person(places_mm[rng.integers(len(places_mm))])
            stretch = np.exp(rng.normal(0, 0.22, 3))
            found.append(Lookalike(kind, place, float(rng.uniform(smallest, largest)), stretch))
    return found


def _direction(rng: np.random.Generator) -> NDArray[np.float64]:
    vector = rng.standard_normal(3)
    unit: NDArray[np.float64] = vector / np.sqrt((vector**2).sum())
    return unit


def _soft(depth_mm: Volume, width_mm: float) -> Volume:
    """Membership from signed depth (positive inside): a linear ramp of that width across the border."""
    ramp: Volume = np.clip(depth_mm / np.float32(width_mm) + np.float32(0.5), 0, 1)
    return ramp


def _joined(part: NDArray[np.bool_], seed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected pieces of `part` that touch `seed`, with their soft border."""
    pieces, count = ndimage.label(part)
    kept = np.zeros(count + 1, bool)
    kept[pieces[seed]] = True
    kept[0] = False
    joined: NDArray[np.bool_] = ndimage.binary_dilation(kept[pieces])
    return joined


class Canvas:
    """Four contrasts of one head and its label, painted layer by layer.

    `signal` is float32 (4, X, Y, Z) in the order of `Signal`; `label` is uint8 (X, Y, Z).
    """

    def __init__(self, head: Head, textures: Textures, tissue_factor: NDArray[np.float64]) -> None:
        """`tissue_factor` (3, 4): this patient's deviation of csf, grey, white from TISSUE, by contrast."""
        self._head, self._grid, self._textures = head, head.grid, textures
        means = (np.array([TISSUE[name] for name in ("csf", "grey", "white")]) * tissue_factor).astype(
            np.float32
        )
        self.signal = np.stack([head.csf * m[0] + head.grey * m[1] + head.white * m[2] for m in means.T])
        self.label = np.zeros(self._grid.shape, np.uint8)

    def add_lookalike(self, lesion: Lookalike, factor: NDArray[np.float64]) -> None:
        """Paints one look-alike into parenchyma; `factor` (4,) is its deviation from LESION."""
        box = self._grid.box(lesion.centre_mm, 2.2 * lesion.radius_mm * float(lesion.stretch.max()))
        depth = self._blob(box, lesion.centre_mm, lesion.radius_mm, lesion.stretch)
        tissue = (1 - self._head.csf[box]) * self._head.brain[box]
        layers = [(lesion.kind, depth)]
        if lesion.kind == "walled cyst":
            layers = [("vessel", depth), ("cyst", depth - np.float32(WALL_MM))]
        for kind, inside in layers:
            self._paint(box, _soft(inside, 4.0) * tissue, np.asarray(LESION[kind]) * factor, 0.08)

    def add_glioma(self, plan: Glioma, factor: NDArray[np.float64]) -> None:
        """Paints oedema, infiltration, rim, necrosis and blood; `factor` (5, 4) is their deviation from LESION."""
        box = self._grid.box(plan.centre_mm, plan.extent_mm)
        brain = self._head.brain[box]
        one = np.ones(3)
        core = np.maximum(
            self._blob(box, plan.centre_mm, plan.radius_mm, one),
            self._blob(box, plan.centre_mm + plan.lobe_offset_mm, plan.lobe_radius_mm, one),
        )
        infiltrated = self._blob(
            box, plan.centre_mm + plan.infiltration_offset_mm, plan.infiltration_radius_mm, one
        )
        room = self._blob(box, plan.centre_mm, plan.extent_mm - 12.0, one, ragged=False)
        # Oedema follows white matter; cortex resists it and free water ends it.
        reach = plan.reach_mm * (0.15 + 0.95 * self._head.white[box]) * np.exp(0.4 * self._textures.rim[box])
        edema = (
            _soft(np.minimum(np.maximum(core, infiltrated) + reach, room), 4.0)
            * (1 - self._head.csf[box])
            * brain
        )
        edema *= _joined(edema > 0.5, core > 0)
        thickness = plan.rim_mm * np.clip(0.9 + 0.7 * self._textures.rim[box], 0, 2)

        signals = {
            name: np.asarray(LESION[name]) * factor[i]
            for i, name in enumerate(("edema", "infiltration", "rim", "necrosis", "blood"))
        }
        if plan.faint_on is not None:
            healthy = TISSUE["white"][plan.faint_on]
            signals["edema"][plan.faint_on] = healthy + 0.2 * (signals["edema"][plan.faint_on] - healthy)

        self._paint(box, edema, signals["edema"], 0.08, EDEMA)
        self._paint(
            box,
            _soft(infiltrated, 3.0) * (1 - self._head.csf[box]) * brain,
            signals["infiltration"],
            0.06,
            CORE,
        )
        self._paint(box, _soft(core, 2.0) * brain, signals["rim"], 0.08, ENHANCING)
        inside = core - thickness
        self._paint(box, _soft(inside, 2.0) * brain, signals["necrosis"], 0.08, CORE)
        if plan.bleeds:
            clot = np.minimum(core - 0.5 * thickness, 6.0 * (self._textures.fine[box] - 0.6))
            self._paint(box, _soft(clot, 2.0) * brain, signals["blood"], 0.05, CORE)

    def _blob(
        self,
        box: tuple[slice, slice, slice],
        centre: NDArray[np.float64],
        radius: float,
        stretch: NDArray[np.float64],
        ragged: bool = True,
    ) -> Volume:
        """Signed depth in mm of a ball, lobulated where `ragged`."""
        x, y, z = (
            ((axis[part] - middle) / factor).astype(np.float32)
            for axis, part, middle, factor in zip(self._grid.axes, box, centre, stretch, strict=True)
        )
        distance: Volume = np.sqrt(x[:, None, None] ** 2 + y[None, :, None] ** 2 + z[None, None, :] ** 2)
        if not ragged:
            return np.float32(radius) - distance
        lobes: Volume = 1 + 0.28 * self._textures.coarse[box] + 0.14 * self._textures.fine[box]
        return np.float32(radius) * lobes - distance

    def _paint(
        self,
        box: tuple[slice, slice, slice],
        member: Volume,
        signal: NDArray[np.float64],
        mottle: float,
        label: int | None = None,
    ) -> None:
        uneven = 1 + np.float32(mottle) * self._textures.fine[box]
        for channel, value in zip(self.signal, signal, strict=True):
            channel[box] += member * (np.float32(value) * uneven - channel[box])
        if label is not None:
            self.label[box][member > 0.5] = label
