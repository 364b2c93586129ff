"""The pictures of a grid on a tiny cascade: shared, equal to the cascade's, continued."""

import dataclasses
import json

import numpy as np
import pytest

from imagen_jax import cascade, drawing, drawn_sets, picture_set, schema, set_reservations
from imagen_jax.encoders_in_turn import Encoders
from imagen_jax.evals import grid_evaluation, grid_pictures, settings_grid
from imagen_jax.picture_set import Requests
from tests.test_cascade import MESH, config  # noqa: F401  a fixture
from tests.test_drawing import Encoder

REQUESTS = Requests(["a red apple", "a blue cat"], 2, 7)
STAGES = ["base", "sr_1"]


@pytest.fixture
def make_drawer(config, monkeypatch):  # noqa: F811
    """A function that makes a drawer of the cascade."""
    load = cascade.load_cascade
    monkeypatch.setattr(cascade, "load_cascade", lambda *some: load(*some, mesh=MESH))
    monkeypatch.setattr(drawing, "load_encoders", lambda *_: Encoders.single(Encoder()))
    base = config["base"] | {"sampling": config["base"]["sampling"] | {"aug_level": 0.0}}
    complete = schema.complete_cascade(config | {"base": base})
    return lambda: drawing.Drawer(complete, STAGES)


def files(manifest):
    rows = picture_set.manifest_rows(manifest)
    return [(manifest.parent / row["file"]).read_bytes() for row in rows]


@pytest.mark.slow
def test_a_point_equals_the_cascade_and_is_drawn_once(make_drawer, tmp_path, monkeypatch):
    """Catches base pictures drawn per point, low-res images that are not those of the cascade, a
    set with the settings of another one, prompts encoded per set, and finished or shared pictures
    drawn again after an interruption.
    """
    drawn, programs = [], []
    generate, program = cascade.generate, cascade.sample_program

    def counted(stages, seeds, text, batch_size, lowres, rows):
        assert len(stages) == 1 and stages[0].resident
        drawn.append((stages[0].sampling["w"], stages[0].stage.lowres_size, list(rows)))
        return generate(stages, seeds, text, batch_size, lowres, rows)

    def counted_program(stage, mesh, shardings, sampling, index, size):
        programs.append((index, sampling["w"], sampling["aug_level"]))
        return program(stage, mesh, shardings, sampling, index, size)

    drawer = make_drawer()
    encoder = drawer.encoders.load("")
    axes = settings_grid.parse(["sr_1.aug_level=0,.2", "base.w=2,1"], drawer.config, STAGES)
    points = settings_grid.points(axes, drawer.config, STAGES)
    with monkeypatch.context() as patch:
        patch.setattr(cascade, "generate", counted)
        patch.setattr(cascade, "sample_program", counted_program)
        manifests = grid_pictures.draw(drawer, points, REQUESTS, tmp_path / "grid")
    everything = list(range(len(REQUESTS)))
    assert drawn == [(2.0, 0, everything), (1.0, 0, everything), *[(2.0, 8, everything)] * 4]
    assert programs == [(0, 2.0, 0.0), (0, 1.0, 0.0), (1, 2.0, 0.0), (1, 2.0, 0.2)]
    assert sorted(encoder.texts) == sorted(REQUESTS.prompts) and drawer.encoders._encoder is None

    whole = drawing.draw(make_drawer(), REQUESTS, tmp_path / "whole", drawn_sets.NO_IMAGE)
    (same,) = (p for p in points if p.settings == {"sr_1.aug_level": 0.2, "base.w": 2.0})
    assert files(manifests[same]) == files(whole)
    others = [files(manifests[point]) for point in points if point is not same]
    assert all(other != files(whole) for other in others)
    row = picture_set.manifest_rows(manifests[same])[0]
    record = json.loads((manifests[same].parent / row["file"]).with_suffix(".json").read_text())
    of_cascade = json.loads(next((tmp_path / "whole").glob("0000_*.json")).read_text())
    assert record == of_cascade  # so that `sample --reproduce` draws it

    # interrupted: a picture of each prompt is missing in one point
    before, drawer = files(manifests[points[0]]), make_drawer()
    for row in picture_set.manifest_rows(manifests[points[0]])[::2]:
        (manifests[points[0]].parent / row["file"]).unlink()
    points = settings_grid.points(axes, drawer.config, STAGES)
    drawn.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cascade, "generate", counted)
        again = grid_pictures.draw(drawer, points, REQUESTS, tmp_path / "grid")
    assert drawn == [(2.0, 8, [0, 2])] and files(again[points[0]]) == before
    grid_pictures.draw(drawer, points, REQUESTS, tmp_path / "grid")  # needs no encoder any more
    assert len(drawn) == 1


def test_settings_of_later_stages_leave_a_set_as_it_is(make_drawer):
    """Catches base pictures that are drawn again because another setting of sr_1 changed, and
    pictures of other settings that are taken for those of a set.
    """
    drawer = make_drawer()

    def jobs(**settings):
        section = drawer.config["sr_1"]
        later = section | {"sampling": section["sampling"] | settings}
        axes = settings_grid.parse(["base.w=2,1"], drawer.config | {"sr_1": later}, STAGES)
        points = settings_grid.points(axes, drawer.config | {"sr_1": later}, STAGES)
        return [
            drawn_sets.job_of(
                REQUESTS, grid_pictures.record(drawer, node), grid_pictures.free_fields(node)
            )
            for level in settings_grid.levels(points)
            for node in level
        ]

    before, after = jobs(), jobs(w=3.0)
    assert before[:2] == after[:2] and before[0] != before[1]
    assert before[2] != after[2] and before[2] != before[3]


def test_pictures_of_other_prompts_do_not_count_as_drawn(make_drawer, tmp_path):
    """Catches a grid that fits on the disk only because another one is in its directory."""
    drawer = make_drawer()
    axes = settings_grid.parse(["sr_1.w=2,1"], drawer.config, STAGES)
    points = settings_grid.points(axes, drawer.config, STAGES)
    place = tmp_path / points[0].parent.directory / grid_pictures.PICTURES
    for requests, pictures in ((Requests(["other"], 4, 7), 4), (REQUESTS, 1)):
        job = grid_pictures.job(drawer, points[0].parent, requests)
        with set_reservations.reserve(place, job, len(requests)) as first:
            part = picture_set.part_path(place, first, "p")
            made = picture_set.PictureSet(place, requests, {}, first, part)
            for row in range(pictures):
                made.add(row, [np.zeros((8, 8, 3), np.uint8)])
    found = list(grid_evaluation.missing(drawer, points, tmp_path, REQUESTS))
    assert found == [(3, (8, 8)), (4, (16, 16)), (4, (16, 16))]


def test_processes_agree_on_the_points_and_on_each_field(make_drawer):
    """Catches processes with other points, and a message that does not name the field."""
    drawer = make_drawer()

    def facts(grid, **settings):
        section = drawer.config["sr_1"]
        changed = drawer.config | {"sr_1": section | {"sampling": section["sampling"] | settings}}
        points = settings_grid.points(settings_grid.parse(grid, changed, STAGES), changed, STAGES)
        return grid_pictures.facts_of(drawer, points, REQUESTS)

    before, other = facts(["base.w=2,1"]), facts(["base.w=2,3"])
    differ = lambda now: [name for name in before if before[name] != now[name]]
    assert differ(other) == ["--grid"]
    assert differ(facts(["base.w=2,1"], w=3.0)) == ["config.sr_1.sampling.w"]


def test_settings_with_another_program_keep_the_parameters(config):  # noqa: F811
    """Catches weights that are loaded again for each setting, and a stage with the old settings."""
    (loaded,) = cascade.load_cascade(config, ["base"])
    other = loaded.with_sampling(dict(loaded.sampling) | {"w": 9.0}, 0)
    assert other.params is loaded.params and other.sampling["w"] == 9.0
    assert other.sample is not loaded.sample
    assert dataclasses.replace(other, sampling=loaded.sampling, sample=loaded.sample) == loaded
