"""Which waiting texts to encode together on a CPU."""

from collections.abc import Sequence

# What a batch costs beside its characters, in characters: with all-MiniLM-L6-v2 on a CPU, reading the weights and the
# layers' overhead take as long as some 35 word pieces.
BATCH_COST = 160
TEXT_COST = 9  # the two word pieces around every text, in characters
MOST_WORKERS = 4  # batches at once; with more, their Python parts would wait for each other


def batch_of_like_lengths(lengths: Sequence[int], most: int) -> list[int]:
    """Which texts to encode together with the first.

    A batch is padded to its longest text, so texts of like length belong together; but every batch has a cost of its
    own. The texts, in order of length, are cut into the batches that cost least in sum, by dynamic programming.

    Args:
        lengths: The texts' lengths in characters.
        most: Texts in a batch.

    Returns:
        The indices of the batch that holds the first text.

    Example:
        >>> batch_of_like_lengths([30, 31, 400, 29, 33], most=32)
        [3, 0, 1, 4]
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    place = order.index(0)
    order = order[max(0, place - most) : place + most]  # the rest is too far away
    costs = [0.0]  # of the cheapest cut of the shortest texts, by their number
    cuts = [0]  # where the last batch of that cut starts
    for end, index in enumerate(order, start=1):
        padded = lengths[index] + TEXT_COST
        cost, start = min(
            (costs[start] + BATCH_COST + (end - start) * padded, start) for start in range(max(0, end - most), end)
        )
        costs.append(cost)
        cuts.append(start)
    end = len(order)
    while 0 not in (batch := order[cuts[end] : end]):
        end = cuts[end]
    return batch
