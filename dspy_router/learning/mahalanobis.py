"""Relative Mahalanobis distance: how much nearer an input is to an option's mean than to everything.

    min_o [(x - μ_o)ᵀ C⁻¹ (x - μ_o)] - (x - μ)ᵀ G⁻¹ (x - μ)

with the options' means μ_o and the mean μ of all rows, the covariance C within options, shared by them, and G of all
rows (Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection"). C is shrunk as in
Ledoit and Wolf 2004, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", and G = C + B with the
covariance B of the options' means, as the total covariance is. Then C⁻¹ - G⁻¹ has no negative eigenvalue. If G were
shrunk on its own, it would: where rows are few for their dimension, as an agent's steps are, inputs would count as the
more familiar the farther they lie in directions in which training never went.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class RelativeMahalanobis:
    """The distance to t options, written out so that an input x costs one product with each matrix.

    It is the smallest (x - μ)ᵀ Q (x - μ) - 2 A_o·(x - μ) + c_o, with Q = C⁻¹ - G⁻¹, A_o = C⁻¹ (μ_o - μ) and
    c_o = A_o·(μ_o - μ).

    Attributes:
        center: Float32 [d], the mean μ of all rows.
        quadratic: Float32 [d, d], Q.
        linear: Float32 [t, d], A.
        constant: Float32 [t], c.
    """

    center: np.ndarray
    quadratic: np.ndarray
    linear: np.ndarray
    constant: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, options: np.ndarray, count: int) -> "RelativeMahalanobis":
        """Of vectors [n, d] and the option of each, int [n] below `count`, each there at least once."""
        rows = np.bincount(options, minlength=count)
        means = np.zeros((count, vectors.shape[1]))
        np.add.at(means, options, vectors)
        center = vectors.mean(axis=0, dtype=np.float64)
        means = means / rows[:, None] - center
        centered = vectors - center
        free = len(vectors) - count
        # With fewer rows than dimensions, or hardly more than options, what is left within options is not enough to
        # estimate from: then the distances are Euclidean.
        everything: np.ndarray = np.eye(vectors.shape[1])
        within = everything
        if free >= max(count, vectors.shape[1]):
            covariance = _covariance(centered - means[options]) * len(vectors) / free
            within = np.linalg.inv(covariance)
            everything = np.linalg.inv(covariance + (means.T * rows) @ means / len(vectors))
        linear = means @ within
        constant = (linear * means).sum(axis=1)
        return cls(*(np.asarray(part, np.float32) for part in (center, within - everything, linear, constant)))

    def distance(self, vectors: np.ndarray, options: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Smallest relative distance [n] of vectors [n, d] to the means of some options."""
        centered = vectors - self.center
        spread = np.einsum("nd,nd->n", centered @ self.quadratic, centered)
        return spread + (self.constant[options] - 2 * centered @ self.linear[options].T).min(axis=1)


def _covariance(centered: np.ndarray) -> np.ndarray:
    from sklearn.covariance import ledoit_wolf  # needed here alone, and heavy: a route that only decides does without

    covariance = ledoit_wolf(centered, assume_centered=True)[0]
    # Rows that are all alike leave nothing to invert; unit vectors differ by more than this.
    return covariance + 1e-6 * np.eye(len(covariance))
