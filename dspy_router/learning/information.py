"""Which rollout is worth most next: how much its outcome would say.

If an option is the right one with probability q and rewards are wrong with probability ε, the outcome of trying it
tells, in nats (MacKay, "Information-Based Objective Functions for Active Data Selection", 1992),

    I = H(ε + (1 - 2ε) q) - H(ε),    H(p) = -p log p - (1 - p) log(1 - p)

It is largest where success is a toss-up: neither what is sure to succeed nor what is sure to fail teaches much.
"""

from collections.abc import Sequence

import numpy as np

# Every option is taken to be right for at least this share of an even share of the examples, until tries speak against
# it. Of 0, 0.1, 0.2, 0.3 and 0.5 the best on held-out BANKING77 training rows and CLINC150's validation rows.
RARE_SHARE = 0.5
PATIENCE = 10.0  # failed tries of an option that halve that share
PASSES = 20
LARGEST_LIFT = 1e4
# A repeated look must find at least so much noise to be worth the name.
SMALLEST_MEASURED_NOISE = 0.01
LARGEST_NOISE = 0.45  # beyond it a 0/1 reward tells next to nothing


def entropy_of(probability: np.ndarray) -> np.ndarray:
    """Entropy in nats of a 0/1 outcome with these chances of success.

    Example:
        >>> entropy_of(np.array([0.5, 1.0])).round(4).tolist()
        [0.6931, 0.0]
    """
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log1p(-p))


def information(chance: np.ndarray, noise: float = 0.0) -> np.ndarray:
    """Nats that the outcome tells of whether a choice is right, which it is with this chance.

    Example:
        >>> information(np.array([0.5, 0.99])).round(2).tolist()
        [0.69, 0.06]
        >>> information(np.array([0.5, 0.99]), noise=0.25).round(2).tolist()
        [0.13, 0.01]
    """
    return entropy_of(noise + (1 - 2 * noise) * chance) - entropy_of(np.array(noise))


def lift_rare_options(probability: np.ndarray, weight: np.ndarray, failures: np.ndarray) -> np.ndarray:
    """Probabilities in which no option is overlooked.

    A description that misleads the policy hides an option: it is never tried, so it never gets a positive. Each
    option is given an expected share of the rows of at least `RARE_SHARE / k`, less the more its tries have failed,
    by scaling its column (iterative proportional fitting, Deming and Stephan, 1940): its most likely rows then come
    up. What the outcomes have settled hardly moves.

    Args:
        probability: Float [n, k], rows that sum to one; 0 for what is ruled out.
        weight: Float [n], how much a row counts.
        failures: Float [k], how often each option was tried without success.

    Returns:
        Float32 [n, k], rows that sum to one.

    Example:
        >>> policy = np.array([[0.9, 0.1, 0.0], [0.9, 0.09, 0.01]])
        >>> lift_rare_options(policy, np.ones(2), np.zeros(3)).sum(axis=0) > 0.29
        array([ True,  True,  True])
    """
    options = probability.shape[1]
    probability, weight = probability.astype(np.float32), weight.astype(np.float32)
    wanted = RARE_SHARE * weight.sum() / options / (1 + failures / PATIENCE)
    lifted, factor = probability, np.ones(options)
    for _ in range(PASSES):
        short = wanted / np.maximum(weight @ lifted, 1e-9)
        if (short <= 1.05).all():
            break
        factor = np.minimum(factor * np.clip(short, 1.0, 5.0), LARGEST_LIFT)
        lifted = probability * factor.astype(np.float32)
        lifted /= np.maximum(lifted.sum(axis=1, keepdims=True), 1e-12)
    return lifted


def measured_noise(repeats: Sequence[tuple[bool, bool]]) -> float:
    """The share of wrong rewards, from the outcomes of equal runs made twice.

    Two looks disagree with probability d = 2ε(1 - ε), so ε = (1 - √(1 - 2d)) / 2.

    Args:
        repeats: Pairs of outcomes.

    Returns:
        In [0, 0.45]; 0 if all agree, which is the rule: most metrics are deterministic.

    Example:
        >>> round(measured_noise([(True, True)] * 82 + [(True, False)] * 18), 3)
        0.1
    """
    differing = sum(first != second for first, second in repeats)
    if not differing:
        return 0.0
    share = min(differing / len(repeats), 0.5)
    return float(np.clip((1 - np.sqrt(1 - 2 * share)) / 2, SMALLEST_MEASURED_NOISE, LARGEST_NOISE))
