"""Where the time of a path goes, by kernel, as PyTorch's profiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

TOP = 15


def summary(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """The kernels that take most of the time, on the CPU the operations; with their share."""
    activity = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    activities = [activity.CPU, activity.CUDA] if cuda else [activity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    # Operations and the kernels that they start both have device time: those of the device count.
    events = [
        event
        for event in profile.key_averages()
        if not cuda or event.device_type != DeviceType.CPU
    ]
    events.sort(key=lambda event: getattr(event, name), reverse=True)
    total = sum(getattr(event, name) for event in events)
    return [
        {
            "name": event.key[:120],
            "calls": event.count,
            "ms": getattr(event, name) / 1e3,
            "share": getattr(event, name) / total if total else 0.0,
        }
        for event in events[:TOP]
    ]
