import numpy as np
import pytest
from scipy import stats

from models_store.decisions import abstention


def drawn(rows, seed, hardness=3.0):
    """Confidences and errors of a calibrated classifier."""
    rng = np.random.default_rng(seed)
    confidence = 0.5 + 0.5 * rng.beta(hardness, 0.6, rows)
    return confidence, rng.random(rows) > confidence


def true_risk(limit, hardness=3.0):
    """P(wrong | answered) of that classifier, by integration."""
    x = np.linspace(0, 1, 20_001)[1:-1]
    density, confidence = stats.beta(hardness, 0.6).pdf(x), 0.5 + 0.5 * x
    answered = confidence > limit
    return float((density * (1 - confidence))[answered].sum() / density[answered].sum())


@pytest.mark.parametrize("risk", [0.02, 0.05])
def test_the_bound_is_violated_no_more_often_than_its_confidence_allows(risk):
    violated = found = 0
    for seed in range(300):
        chosen = abstention.threshold(*drawn(1500, seed), risk)
        if chosen is not None:
            found += 1
            violated += true_risk(chosen.confidence) > risk
    assert found > 200
    # More violations than the confidence allows would be an accident of less than one in ten thousand.
    assert stats.binom.sf(violated - 1, 300, 1 - abstention.CONFIDENCE) > 1e-4


def test_most_of_what_could_be_answered_is_answered():
    """With many images the threshold comes close to the best one."""
    chosen = abstention.threshold(*drawn(20_000, 0), 0.05)
    best = next(limit for limit in np.linspace(0.5, 1, 501) if true_risk(limit) <= 0.05)
    confidence, _ = drawn(50_000, 1)
    assert (confidence > chosen.confidence).mean() > 0.93 * (confidence > best).mean()


def test_a_classifier_without_errors_answers_everything_and_few_images_guarantee_nothing():
    confidence = np.random.default_rng(0).random(400)
    chosen = abstention.threshold(confidence, np.zeros(400, bool), 0.02)
    assert chosen == abstention.Threshold(-np.inf, 400, 0)
    assert abstention.threshold(confidence[:140], np.zeros(140, bool), 0.02) is None  # 0.98 ** 140 > 0.05
    assert abstention.threshold(confidence, np.ones(400, bool), 0.1) is None


def test_the_least_risk_is_the_smallest_that_has_a_threshold():
    confidence, wrong = drawn(1000, 0)
    least = abstention.least_risk(confidence, wrong)
    assert abstention.threshold(confidence, wrong, least) is not None
    assert abstention.threshold(confidence, wrong, 0.5 * least) is None
    assert abstention.least_risk(confidence, np.ones(1000, bool)) is None


def test_ties_at_the_threshold_are_not_answered():
    confidence = np.repeat([0.99, 0.6], 300)
    wrong = np.zeros(600, bool)
    wrong[300:400] = True
    chosen = abstention.threshold(confidence, wrong, 0.05)
    assert (chosen.answered, chosen.wrong) == (300, 0)
    assert chosen.confidence == 0.6


def test_by_cost_an_answer_is_given_where_it_is_cheaper_in_expectation():
    limit = abstention.least_confidence(wrong_cost=10, review_cost=1)
    assert limit == pytest.approx(0.9)
    for confidence in (0.85, 0.95):
        assert (10 * (1 - confidence) < 1) == (confidence > limit)
