"""Learning concepts of 3x3 positions from activations that are made of them."""

from activations import FOUND, best_cosines, planted

from deconvnet import LearningSettings, learn_filters


def test_planted_concepts_are_found_from_a_random_start():
    concepts, y = planted(0, K=8, C=16, N=16, size=8, active=6)
    learning = LearningSettings(epochs=25, init="random")
    learned = learn_filters(y, 8, 3, lam=3, non_negative=True, learning=learning)
    cosines = best_cosines(concepts, learned.filters)
    assert (cosines > FOUND).float().mean() >= 0.95
    # Filters that have learned nothing match nothing.
    strangers, _ = planted(1, K=8, C=16, N=1, size=8, active=6)
    assert best_cosines(strangers, learned.filters).max() < 0.8
