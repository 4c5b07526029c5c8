"""`Laws`: the laws that plans and recipes go by, in one object that can be fitted, saved and replaced in one call."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FitError, LawError
from .capacity import CapacityGapLaw
from .distilled import DistillationLaw
from .records import Records, as_records
from .supervised import SupervisedLaw


@dataclass(frozen=True)
class Laws:
    """The capacity-gap law and the scaling laws; the published ones without arguments.

    Attributes:
        capacity_gap: Which teacher size is best.
        distillation: What loss distillation gives; holds the supervised law of the same data.
    """

    capacity_gap: CapacityGapLaw = field(default_factory=CapacityGapLaw)
    distillation: DistillationLaw = field(default_factory=DistillationLaw)

    @property
    def supervised(self) -> SupervisedLaw:
        """What loss training on text alone gives."""
        return self.distillation.supervised

    @classmethod
    def fit(cls, records: Records, **options: Any) -> Laws:
        """All laws from the user's own runs; see the `fit` of each law.

        Raises:
            FitError: Records that a law cannot be fitted to, or that show no best teacher size.
        """
        records = as_records(records)
        gap = CapacityGapLaw.fit(records)
        if gap.law is None:
            raise FitError(
                "These runs show no capacity-gap law",
                found=gap.verdict,
                fix="Fit DistillationLaw alone and pass Laws(distillation=...).",
            )
        return cls(gap.law, DistillationLaw.fit(records, **options).law)

    def save(self, path: str | os.PathLike) -> None:
        """Write the laws as JSON; the file appears only when it is complete."""
        path = Path(path)
        content = {"capacity_gap": self.capacity_gap.to_dict(), "distillation": self.distillation.to_dict()}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Laws:
        """Read laws that `save` has written.

        Raises:
            LawError: A file that is missing or damaged, or a coefficient that cannot be.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            distillation = dict(content["distillation"])
            supervised = SupervisedLaw(**_with_ranges(distillation.pop("supervised")))
            return cls(
                CapacityGapLaw(**_with_ranges(content["capacity_gap"])),
                DistillationLaw(**_with_ranges(distillation), supervised=supervised),
            )
        except OSError as error:
            raise LawError("The laws cannot be read", found=f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, LawError):
                raise
            raise LawError("The file of laws is damaged", found=f"{path}: {error!r}") from error


def _with_ranges(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "ranges": {name: tuple(ends) for name, ends in values["ranges"].items()}}
