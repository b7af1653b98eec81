"""Saturation figures of sigmoid layers, and `watch`, which logs them for any PyTorch model.

May import the notes' files.
"""

from nnce.monitoring.saturation import LayerFigures, layer_figures, slowdown
from nnce.monitoring.watching import Watcher, watch

__all__ = ["LayerFigures", "Watcher", "layer_figures", "slowdown", "watch"]
