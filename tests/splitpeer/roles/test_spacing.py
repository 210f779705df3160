"""Images whose spacing differs from hospital to hospital meet on the job's grid, if the job names one (SP-11-21)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from splitpeer.daemon import happenings as h
from splitpeer.data.files import Case
from splitpeer.data.nifti import read_header
from splitpeer.data.sampling import Sample, batch_digest
from splitpeer.federation.terms import cut_descriptors, job_on_wire
from splitpeer.results.own_scan import OwnScan, brought_back
from splitpeer.site.opening import open_job
from splitproto.errors import PolicyRefused
from splitproto.messages import Forward, JobOffer
from splitproto.records import Seat
from splitproto.tensors import schema_digest

from .scene import Scene
from .served import (
    DATA,
    assert_mask,
    cast_frozen,
    cast_joint,
    comes,
    finish,
    held_out,
    images_of,
    refused,
    segmented,
    serving,
)

JOB_MM = (1.5, 1.5, 1.0)


def thin(source: Path, path: Path, every: Sequence[int]) -> None:
    """The same head on a coarser grid, whose first voxel is the same."""
    image = nib.Nifti1Image.from_filename(source)
    x, y, z = every
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = image.affine @ np.diag([x, y, z, 1.0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::x, ::y, ::z], affine), path)


@pytest.fixture(params=[cast_joint, cast_frozen])
def coarse(scene: Scene, request: pytest.FixtureRequest) -> Scene:
    """A complete run of two hospitals: one has voxels of 1 mm, the other of 2 mm, which end earlier."""
    for path in (scene.federation.data / "t2").iterdir():
        thin(path, images_of(scene, "t2") / path.name, (2, 2, 2))
    return finish(request.param(scene, data={**DATA, "spacing": list(JOB_MM)}))


async def test_a_mask_comes_back_to_each_hospitals_own_grid(coarse: Scene) -> None:
    """SP-11.12-9, SP-11.19-11: what the other's image lacks at its end is zeros; the mask is that of the run's own
    prediction, bit for bit."""
    comes(coarse, "NEW_Nora", 77)
    nora = images_of(coarse, "t2") / "NEW_Nora.nii.gz"
    thin(nora, nora, (1, 1, 3))  # a spacing that no image of the run has
    async with serving(coarse):
        (patient,) = held_out(coarse)
        result = await segmented(coarse, "t1ce", patient)
        assert result.provenance.used == ("t1ce", "t2")
        assert result.grid.spacing == JOB_MM and result.grid.shape == (30, 26, 34)
        assert_mask(result, nib.load(coarse.output / "predictions" / f"{patient}.nii.gz"))
        for modality in ("t1ce", "t2"):
            result = await segmented(coarse, modality, "NEW_Nora")
            assert result.provenance.causes == {} and result.grid.spacing == JOB_MM
            case = Case("NEW_Nora", images_of(coarse, modality) / "NEW_Nora.nii.gz")
            own = OwnScan("NEW_Nora", modality, case, read_header(case))
            assert brought_back(result, own).shape == nib.load(case.path).shape


async def test_without_a_spacing_in_the_job_images_that_differ_in_it_are_refused(joint: Scene, make) -> None:
    """SP-11.19-6: and nobody is told the other's."""
    comes(joint, "NEW_Otto", 78)
    path = images_of(joint, "t2") / "NEW_Otto.nii.gz"
    make.nifti(path, nib.load(path).get_fdata(dtype="float32"), spacing=1.25)
    async with serving(joint):
        for modality in ("t1ce", "t2"):
            status = await refused(joint, modality, "NEW_Otto")
            assert (status.cause, status.exit) == ("misaligned", 1)
            assert "is on another grid than that at" in status.reason and "1.25" not in status.reason
        # The service goes on.
        assert (await segmented(joint, "t1ce", held_out(joint)[0])).provenance.missing == ()


@pytest.mark.parametrize("spacing", [None, [1.0, 1.0, 1.0]])
def test_which_windows_a_border_may_cut(scene: Scene, spacing: list[float] | None) -> None:
    """SP-11.12-9: only of a job that resamples, and no window that shows a few voxels alone."""
    scene.cast("t1", **({} if spacing is None else {"data": {"spacing": spacing}}))
    job = job_on_wire(scene.settings)
    offer = JobOffer(bytes(16), (Seat("t1", ("t1",)),), job, schema_digest(cut_descriptors(job)))
    site = open_job(offer, scene.config("site-t1"), h.Reporter())
    key = scene.masks().keys()[0]
    x, y, z = scene.masks().geometry(key).shape
    assert (x, y, z) == (45, 38, 34) and tuple(job.window) == (32, 32)
    inside = [(13, 6, 33), (0, 0, 0)]
    cut = [(14, 6, 33), (29, 6, 0), (-16, 6, 0), (13, 6, 34)]
    never = [(30, 6, 0), (-17, 6, 0), (13, -17, 0), (13, 6, -1)]

    def ask(number: int, origin: tuple[int, int, int]) -> None:
        samples = (Sample(key, origin),)
        site.announce(Forward("evaluate", 0, number, samples, batch_digest(0, samples, None)))

    wrong = never if spacing else [*cut, *never]
    for number, origin in enumerate([*inside, *(cut if spacing else [])]):
        ask(number, origin)
    for origin in wrong:
        with pytest.raises(PolicyRefused, match="cut by the border"):
            ask(9, origin)
    site.close()
