"""The published coefficients, each with its source. Nothing else in the package states a law's number.

They are quoted without the paper at hand: check them against the paper before relying on the last digit. To replace
them for everything at once, make a `Laws` (see `hf_capgap.laws.book`) and pass it on; to replace one law's, construct
that law with other coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

QUOTED = "quoted without the paper at hand"
GIVEN = "coefficients given by the caller"

CAPACITY_GAP_SOURCE = f"Zhang et al., arXiv 2311.07052 (ACL 2025): optimal teacher = 2.5 x student; {QUOTED}"
CAPACITY_GAP_RATIO = 2.5

BUSBRIDGE_SOURCE = f"Busbridge et al., arXiv 2502.08606 (ICML 2025), coefficient tables of the appendix; {QUOTED}"
# L(N, D) = E + (A·N^-alpha + B·D^-beta)^gamma, N non-embedding parameters, D tokens.
SUPERVISED_COEFFICIENTS: Mapping[str, float] = MappingProxyType(
    {"E": 1.220, "A": 3355.0, "B": 18186.0, "alpha": 0.408, "beta": 0.431, "gamma": 0.452}
)
# Equation 8 (see `distilled.DistillationLaw`); the primed letters of the paper are written without their prime.
DISTILLATION_COEFFICIENTS: Mapping[str, float] = MappingProxyType(
    {
        "A": 2243.0,
        "B": 24181.0,
        "alpha": 0.321,
        "beta": 0.637,
        "gamma": 0.764,
        "c0": 2.549,
        "c1": 522.6,
        "f1": 0.090,
        "d1": 1.315,
    }
)
# Students of 143M to 7.75B parameters, on C4 English. The range of tokens is not known to us.
BUSBRIDGE_DATASET = "C4 English"
BUSBRIDGE_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"num_params": (143e6, 7.75e9)})

# Hoffmann et al. 2022 (arXiv 2203.15556): about 20 training tokens per parameter are compute-optimal. Taken as the
# training of a teacher of which nothing is known, and as M = D/N of the "fixed-M" teachers of the protocols.
CHINCHILLA_TOKENS_PER_PARAM = 20.0

# Besiroglu et al. 2024 (arXiv 2404.10102): the Chinchilla form (gamma = 1) fitted again to the points of Hoffmann et
# al.'s Figure 4, read from its SVG, without five outliers.
CHINCHILLA_REFIT_SOURCE = f"Besiroglu et al., arXiv 2404.10102; {QUOTED}"
CHINCHILLA_REFIT: Mapping[str, float] = MappingProxyType(
    {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658, "gamma": 1.0}
)
