from itertools import product

from training.optimisation.seeds import Stream, derive


def test_streams_keys_and_ranks_have_seeds_of_their_own_and_keep_them():
    uses = list(product(Stream, range(5), range(5), range(12)))
    seeds = [derive(3, stream, leg, epoch, rank=rank) for stream, leg, epoch, rank in uses]
    assert len(set(seeds)) == len(uses)
    assert seeds == [derive(3, stream, leg, epoch, rank=rank) for stream, leg, epoch, rank in uses]
    assert derive(4, Stream.WEIGHTS, 0, 0) not in seeds


def test_seeds_stay_those_of_earlier_releases():
    assert derive(0, Stream.WEIGHTS, 0, 0) == EARLIER["weights"]
    assert derive(0, Stream.ORDER, 1, 2) == EARLIER["order"]
    assert derive(7, Stream.DROPOUT, 0, 3) == EARLIER["dropout"]


EARLIER = {"weights": 2968811710, "order": 3923302646, "dropout": 3047702981}
