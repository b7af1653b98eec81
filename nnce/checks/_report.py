"""The report of `check_gradients`."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from nnce.checks._derivatives import Broken, Derivatives, Unsupported
from nnce.checks._torch_private import TANGENT_IGNORED

Verdict = Literal["right", "wrong", "cannot tell", "unsupported"]


class Finding(NamedTuple):
    """The verdict on one derivative."""

    verdict: Verdict
    """"unsupported": the function has no forward mode, or refuses second derivatives (by
    `once_differentiable`, or an error containing "no second derivatives")."""
    error: float
    """The largest relative error measured; NaN if none could be measured."""
    detail: str
    """Location of the largest error, or the reason for "cannot tell"."""
    probed: int = 0
    """The number of input elements probed one by one."""
    elements: int = 0
    """The number of input elements."""
    resolution: float = 0.0
    """The largest undetectable error, relative to the largest derivative, for a function in low
    precision; 0 for float64."""


_OF_WHAT = "Derivatives are of Σ u f, with a random upstream gradient u."


class Report(NamedTuple):
    """The report of `check_gradients`."""

    value: Finding
    """The output; compared only if there is a reference."""
    first: Finding
    """First derivatives by backward."""
    forward_mode: Finding
    """First derivatives by `jvp`."""
    second: Finding
    """Second derivatives: of the backward, with respect to inputs and upstream gradient."""

    @property
    def right(self) -> bool:
        """Whether first derivatives are right, and all other findings right or unsupported."""
        return (
            self.first.verdict == "right"
            and self.value.verdict != "wrong"
            and self.forward_mode.verdict in ("right", "unsupported")
            and self.second.verdict in ("right", "unsupported")
        )

    def __bool__(self) -> bool:
        """Return `right`, so that `assert check_gradients(…)` works."""
        return self.right

    def __str__(self) -> str:
        """A summary sentence, one line per finding, and what the numbers are."""
        lines = [
            f"{name.replace('_', ' '):<13}{finding.verdict:<12}{finding.detail}"
            for name, finding in self._asdict().items()
        ]
        return "\n".join([self._summary(), *lines, _OF_WHAT])

    def _summary(self) -> str:
        verdicts = [finding.verdict for finding in self[1:]]
        verdict: Verdict = "right" if self.right else "cannot tell"
        if "wrong" in (self.value.verdict, *verdicts):
            verdict = "wrong"
        sentence = f"{verdict}: {_listed(self, verdict)}"
        if "unsupported" in verdicts:
            sentence += f"; unsupported: {_listed(self, 'unsupported')}"
        sentence += f"; {self.first.probed:,} of {self.first.elements:,} elements probed"
        resolution = max(finding.resolution for finding in self)
        return sentence + (f"; in low precision, to {resolution:.1e}" if resolution else "")


def _listed(report: Report, verdict: Verdict) -> str:
    """List the findings with a verdict: "values, first and second derivatives, forward mode"."""
    value, first, forward_mode, second = (finding.verdict == verdict for finding in report)
    orders = [order for order, has in (("first", first), ("second", second)) if has]
    words = ["values"] if value and verdict != "cannot tell" else []
    words += [f"{' and '.join(orders)} derivatives"] if orders else []
    words += ["forward mode"] if forward_mode else []
    return ", ".join(words)


def or_unsupported(find: Callable[[], Finding]) -> Finding:
    """Run `find`; derivatives that the function refuses are unsupported."""
    try:
        return find()
    except Unsupported as error:
        return Finding("unsupported", math.nan, str(error))


def or_wrong(ours: Derivatives, find: Callable[[], Finding]) -> Finding:
    """Run `find`; a jvp that raises is wrong, a missing jvp or dropped tangents are not."""
    try:
        finding = or_unsupported(find)
    except Broken as error:
        return Finding("wrong", math.inf, str(error))
    ignoring = ours.ignores_tangents() if finding.verdict != "right" else ""
    if ignoring:
        detail = f"{TANGENT_IGNORED}: {ignoring}"
        return Finding("unsupported", math.nan, detail)
    return finding
