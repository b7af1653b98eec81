"""Figures. Each function draws one and returns it; saving and logging are the caller's."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from nnce.accuracy import Curve


def saturation_atlas(cross_entropy: Sequence[Curve], quadratic: Sequence[Curve]) -> Figure:
    """|dC/dz| against z for y = 0, a panel a dtype: how wrong neurons learn, and who sees it."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, squeeze=False).flatten()
    for panel, ours, slow in zip(panels, cross_entropy, quadratic, strict=False):
        z = ours.z.double()
        shown = (z >= -30) & (z <= 60)
        lines = {
            "cross-entropy, exact": (ours.exact, "black", "-", 5.0),
            "quadratic, exact": (slow.exact, "0.6", "-", 5.0),
            "cross-entropy, nnce": (ours.computed["nnce"], "C0", "-", 1.8),
            "quadratic, nnce": (slow.computed["nnce"], "C1", "-", 1.8),
        }
        if "BCELoss of σ(z)" in ours.computed:
            lines["BCELoss of σ(z)"] = (ours.computed["BCELoss of σ(z)"], "C3", "--", 1.8)
        for label, (values, color, style, width) in lines.items():
            y = values[shown].double().abs()
            panel.plot(
                z[shown],
                y.where(y > 0, float("nan")),
                style,
                color=color,
                lw=width,
                label=label,
                alpha=0.3 if "exact" in label else 1.0,
            )
            if label.startswith("BCELoss"):
                end = int((y > 0).nonzero()[-1])
                panel.plot(z[shown][end], y[end], "x", color=color, ms=9, mew=2)
        panel.set_yscale("log")
        panel.set_ylim(1e-14, 10)
        panel.set_title(ours.dtype)
        panel.set_xlabel("z, where y is 0")
        panel.set_ylabel("|dC/dz|")
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower right", fontsize=8)
    figure.suptitle("The saturation atlas: a line that ends has become exactly 0")
    return figure
