"""Model families as named axes (see `family.Family`), and the audit of a model against its family's table."""

from .axes import Dimension
from .family import Config, Family, Parameter
from .registry import FAMILIES, audit, family_for, is_quantized, supported_model_types

__all__ = [
    "FAMILIES",
    "Config",
    "Dimension",
    "Family",
    "Parameter",
    "audit",
    "family_for",
    "is_quantized",
    "supported_model_types",
]
