import csv

import numpy as np
import pytest

from tests.training.conftest import SMALL
from training import espro, landscape
from training.errors import ConfigError
from training.geometry import volume
from training.measurement.figures.simplexes import by_vertices, in_three_dimensions


def test_coordinates_keep_the_distances_of_up_to_four_vertices():
    points = np.random.default_rng(0).normal(size=(4, 40))
    found = in_three_dimensions(points)
    for i in range(4):
        for j in range(4):
            assert np.linalg.norm(found[i] - found[j]) == pytest.approx(np.linalg.norm(points[i] - points[j]))
    assert in_three_dimensions(points[:2]).shape == (2, 3)


def test_volume_by_number_of_vertices_stays_above_its_floor_until_it_is_flat():
    points = np.zeros((5, 6))
    points[1, 0], points[2, 1], points[3, 2] = 2, 3, 1e-3
    points[4, :3] = 0.2, 0.3, 1e-4
    rows = by_vertices(points, [[0, 1, 2, 3, 4]])
    assert [row["dimension"] for row in rows] == [1, 2, 3, 4]
    assert np.exp([row["log_volume"] for row in rows[:3]]) == pytest.approx([2, 3, 1e-3])
    assert rows[3]["log_volume"] == -np.inf
    assert all(row["log_volume"] > row["floor"] for row in rows[:3])
    assert rows[3]["floor"] == pytest.approx(rows[2]["log_volume"] + np.log(volume.lowest(points) / 4))
    twice = by_vertices(points, [[0, 1, 2], [0, 1, 3]])
    assert np.exp(twice[0]["log_volume"]) == pytest.approx(2)  # one segment, not two
    two = by_vertices(points, [[0, 2], [1, 2]])
    assert np.exp(two[0]["log_volume"]) == pytest.approx(3 + np.sqrt(13))


def test_the_figures_of_a_simplex_are_drawn_and_go_on_where_they_were(tmp_path):
    grow = {"vertices": 2, "vertex_epochs": 1, "points_per_step": 2, "samples": 3, "bank": 0}
    espro.run(espro.Config(name="e", epochs=2, **grow, **SMALL))
    config = landscape.Config(
        of=("e",), face=("2,0,1",), grid=2, train_images=64, bn_images=128, output=tmp_path / "out"
    )
    report = landscape.run(config)
    assert len(report["places"]) == 3 + 3
    for name in ("volume.png", "complex.png", "face-2-0-1.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    assert len(list(csv.DictReader((tmp_path / "out/volume.csv").read_text().splitlines()))) == 2
    kept = (tmp_path / "out/complex.jsonl").read_text()
    assert landscape.run(config)["test_error"] == report["test_error"]
    assert (tmp_path / "out/complex.jsonl").read_text() == kept
    with pytest.raises(ConfigError, match="3 vertices, counted from 0; --face names vertex 3"):
        landscape.run(landscape.Config(of=("e",), face=("0,1,3",), output=tmp_path / "out"))


@pytest.mark.parametrize("face", ["0,1", "0,1,1", "0,1,x", "0,1,2,3"])
def test_a_face_that_is_none_is_told(face):
    with pytest.raises(ConfigError, match="three different vertices"):
        landscape.Config(of=("e",), face=(face,))
