"""Peak speed and memory of accelerators that people rent by the hour, and the time that a number of FLOPs takes."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PlanError

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Device:
    """One accelerator, by its maker's data sheet.

    Attributes:
        name: How people call it.
        peak_flops: FLOP/s of dense matrix products in bfloat16 (float16 on V100 and T4), without sparsity.
        memory_bytes: Its memory.
    """

    name: str
    peak_flops: float
    memory_bytes: float

    def hours(self, flops: float, utilisation: float) -> float:
        """Device-hours that `flops` take at a utilisation in (0, 1].

        Raises:
            PlanError: A utilisation outside that.
        """
        if not 0 < utilisation <= 1:
            raise PlanError("Utilisation is a fraction of the peak speed, above 0 and at most 1", found=utilisation)
        return flops / (self.peak_flops * utilisation) / SECONDS_PER_HOUR


# Data sheets of NVIDIA, AMD and Google. Where a sheet gives only the speed with sparsity, half of it.
_ALL = (
    Device("V100", 125e12, 32e9),
    Device("T4", 65e12, 16e9),
    Device("A10", 125e12, 24e9),
    Device("A100-40GB", 312e12, 40e9),
    Device("A100", 312e12, 80e9),
    Device("L4", 121e12, 24e9),
    Device("L40S", 362e12, 48e9),
    Device("RTX4090", 165e12, 24e9),
    Device("H100", 989e12, 80e9),
    Device("H100-PCIe", 756e12, 80e9),
    Device("H200", 989e12, 141e9),
    Device("B200", 2250e12, 180e9),
    Device("MI250X", 383e12, 128e9),
    Device("MI300X", 1307e12, 192e9),
    Device("TPUv4", 275e12, 32e9),
    Device("TPUv5e", 197e12, 16e9),
    Device("TPUv5p", 459e12, 95e9),
)
DEVICES = {device.name.lower(): device for device in _ALL}


def device_named(name: str | Device) -> Device:
    """A device by name, whatever its case; a `Device` as it is.

    Raises:
        PlanError: An unknown name; the message lists those that are known.
    """
    if isinstance(name, Device):
        return name
    try:
        return DEVICES[name.lower()]
    except KeyError:
        known = ", ".join(device.name for device in _ALL)
        raise PlanError("Unknown device", found=name, fix=f"Known: {known}. Or pass a Device.") from None
