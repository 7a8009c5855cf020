import math

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models_store.uncertainty import combine, softmax
from service.http.errors import ServiceError
from service.inference.pieces import Answer
from service.operations import metrics
from tests.onnx_members import publish

logits = np.random.default_rng(0).normal(size=(4, 7, 3)) * 3
CLASSES = ["cat", "dog", 'the "odd"\none']


def read():
    samples = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            samples[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return samples


def test_every_row_is_observed_once_and_every_request_timed_once(store):
    manifest = publish(store, "one", seeds=range(4)).manifest.model_copy(update={"classes": CLASSES})
    probs = softmax(logits)
    prediction = combine(probs, np.full(4, 0.25))
    for _ in range(2):
        metrics.answered(manifest, "average", Answer(probs, prediction, 0.25, 0.5), 0.125, 1.0)
    found = read()
    labels = (("ensemble", "one"), ("mode", "average"), ("version", "1"))
    for measure in ("predictive_entropy", "expected_entropy", "mutual_information", "disagreement", "confidence"):
        values = getattr(prediction, measure)
        if measure not in ("disagreement", "confidence"):
            values = values / math.log(3)
        assert found[f"modepath_{measure}_ratio_count", labels] == 14
        assert found[f"modepath_{measure}_ratio_sum", labels] == pytest.approx(2 * values.sum())
        for edge in metrics.RATIO:
            bucket = tuple(sorted((*labels, ("le", str(edge)))))
            assert found[f"modepath_{measure}_ratio_bucket", bucket] == 2 * (values <= edge).sum()
    for stage, seconds in (("decode", 0.125), ("queue", 0.25), ("members", 0.5), ("reply", 1.0)):
        assert found[f"modepath_{stage}_seconds_count", labels] == 2
        assert found[f"modepath_{stage}_seconds_sum", labels] == 2 * seconds
    assert found["modepath_members_used_count", labels] == 14
    assert found["modepath_members_used_sum", labels] == 14 * 4
    for index, name in enumerate(CLASSES):
        counted = found.get(("modepath_predictions_total", tuple(sorted((*labels, ("class", name))))), 0)
        assert counted == 2 * (prediction.label == index).sum()


def test_refusals_are_counted_by_their_reason():
    before = read().get(("modepath_refused_total", (("reason", "too_large"),)), 0)
    metrics.refused("too_large")
    assert read()["modepath_refused_total", (("reason", "too_large"),)] == before + 1


def test_every_reason_stands_at_0_before_the_first_refusal():
    metrics.begin()
    found = {dict(labels)["reason"] for name, labels in read() if name == "modepath_refused_total"}
    assert found == {metrics.CLIENT_LEFT, *(error.reason for error in (ServiceError, *ServiceError.__subclasses__()))}
