"""Model families as named axes (see `family.Family`), and the audit of a model against its family's table."""

from .family import Family
from .registry import FAMILIES, Entry, Inventory, audit, family_for, inventory_of, supported_model_types

__all__ = ["FAMILIES", "Entry", "Family", "Inventory", "audit", "family_for", "inventory_of", "supported_model_types"]
