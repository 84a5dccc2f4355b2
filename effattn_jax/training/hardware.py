"""What a device could do at best: the denominator of utilisation, and the floor under a measured time."""

from typing import Any

PEAK_BF16_FLOPS = {  # dense, per device, from the vendors' data sheets; matched by the start of `device_kind`
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device: Any) -> float | None:
    """bfloat16 FLOP/s of a device; None where it is not known (CPUs)."""
    return next((peak for kind, peak in PEAK_BF16_FLOPS.items() if device.device_kind.startswith(kind)), None)


MEMORY_BANDWIDTH = {  # bytes per second, from the same sheets
    "NVIDIA B200": 8.0e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA A100": 2.0e12,
    "TPU v4": 1.2e12,
    "TPU v5 lite": 0.82e12,
    "TPU v5e": 0.82e12,
    "TPU v5p": 2.77e12,
    "TPU v5": 2.77e12,
    "TPU v6": 1.64e12,
    "TPU7x": 7.4e12,
}


def memory_bandwidth(device: Any) -> float | None:
    """Bytes per second of a device's memory; None where it is not known (CPUs)."""
    return next((rate for kind, rate in MEMORY_BANDWIDTH.items() if device.device_kind.startswith(kind)), None)
