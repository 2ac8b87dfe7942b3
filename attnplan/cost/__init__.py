"""What a graph costs on a device: a catalogue of devices, one rule per op, a roofline and peak memory."""

from attnplan.cost.calibration import parameters_for
from attnplan.cost.device import Device, Target, catalogue, resolve
from attnplan.cost.model import OpCost, Prediction, price
from attnplan.cost.rules import Cost
from attnplan.cost.setting import KernelModel

__all__ = [
    "Cost",
    "Device",
    "KernelModel",
    "OpCost",
    "Prediction",
    "Target",
    "catalogue",
    "parameters_for",
    "price",
    "resolve",
]
