from training.optimisation.seeds import derive


def test_a_place_has_its_own_seed_and_keeps_it():
    places = [(0, i, j) for i in range(20) for j in range(20)] + [(1, i, 0) for i in range(20)]
    found = [derive(3, *place) for place in places]
    assert len(set(found)) == len(places)
    assert found == [derive(3, *place) for place in places]
    assert derive(4, 0, 0, 0) not in found
