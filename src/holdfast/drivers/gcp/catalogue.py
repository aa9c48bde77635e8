"""Machine types that suit training, with prices for when the billing catalogue can't be asked.

Prices are list prices of us-central1 in November 2026, rounded, without disks; those of spot are typical: Google
changes them up to once a day. Sources: https://cloud.google.com/compute/all-pricing, https://cloud.google.com/spot-vms/pricing
"""

from __future__ import annotations

from dataclasses import dataclass

PRICED_ON = "2026-11-01"
PRICED_REGION = "us-central1"


@dataclass(frozen=True, slots=True)
class MachineType:
    vcpus: int
    memory_gib: float
    spot_usd_per_hour: float
    on_demand_usd_per_hour: float
    gpus: int = 0
    gpu_name: str = ""


CURATED: dict[str, MachineType] = {
    "n2-standard-2": MachineType(2, 8, 0.0291, 0.0971),
    "n2-standard-4": MachineType(4, 16, 0.0583, 0.1942),
    "n2-standard-8": MachineType(8, 32, 0.1166, 0.3885),
    "n2-standard-16": MachineType(16, 64, 0.2331, 0.7769),
    "n2-standard-32": MachineType(32, 128, 0.4662, 1.5539),
    "c3-standard-4": MachineType(4, 16, 0.0846, 0.2088),
    "c3-standard-8": MachineType(8, 32, 0.1692, 0.4176),
    "c3-standard-22": MachineType(22, 88, 0.4652, 1.1484),
    "g2-standard-4": MachineType(4, 16, 0.2827, 0.7068, 1, "L4"),
    "g2-standard-8": MachineType(8, 32, 0.3414, 0.8536, 1, "L4"),
    "g2-standard-24": MachineType(24, 96, 0.7991, 1.9977, 2, "L4"),
    "g2-standard-48": MachineType(48, 192, 1.5982, 3.9954, 4, "L4"),
    "g2-standard-96": MachineType(96, 384, 3.1963, 7.9908, 8, "L4"),
    "a2-highgpu-1g": MachineType(12, 85, 1.4693, 3.6733, 1, "A100"),
    "a2-highgpu-2g": MachineType(24, 170, 2.9387, 7.3466, 2, "A100"),
    "a2-highgpu-4g": MachineType(48, 340, 5.8773, 14.6932, 4, "A100"),
    "a2-highgpu-8g": MachineType(96, 680, 11.7546, 29.3865, 8, "A100"),
    "a2-ultragpu-1g": MachineType(12, 170, 2.5340, 5.0688, 1, "A100-80GB"),
    "a2-ultragpu-8g": MachineType(96, 1360, 20.2754, 40.5504, 8, "A100-80GB"),
    "a3-highgpu-8g": MachineType(208, 1872, 31.7700, 88.2500, 8, "H100"),
}

GPU_NAMES = {
    "nvidia-l4": "L4",
    "nvidia-tesla-a100": "A100",
    "nvidia-a100-80gb": "A100-80GB",
    "nvidia-h100-80gb": "H100",
    "nvidia-h100-mega-80gb": "H100",
    "nvidia-h200-141gb": "H200",
    "nvidia-b200": "B200",
    "nvidia-tesla-t4": "T4",
    "nvidia-tesla-v100": "V100",
    "nvidia-tesla-p100": "P100",
    "nvidia-tesla-p4": "P4",
}


def gpu_name(accelerator_type: str) -> str:
    """As jobs name it: `nvidia-tesla-t4` is T4."""
    return GPU_NAMES.get(
        accelerator_type, accelerator_type.removeprefix("nvidia-").removeprefix("tesla-").split("-")[0].upper()
    )


def typical_interruptions_per_hour(gpus: int) -> float:
    """A prior until there is history: Google publishes no rates. Large GPU machines are taken most often."""
    return 0.03 if gpus == 0 else 0.10 if gpus < 8 else 0.15
