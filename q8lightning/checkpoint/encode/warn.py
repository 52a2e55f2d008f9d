"""Warn of tensors that are stored otherwise than the policy's rules say."""

import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any

from q8lightning.checkpoint.layout.optimizer_states import UNKNOWN
from q8lightning.checkpoint.report import Guarded, Kept, SaveReport

NAMED = 20
"""How many tensors a warning names. The summary in the checkpoint names all of them."""


def warn_of(report: SaveReport) -> None:
    """Warn of all that a report has, in one warning for each reason."""
    warn_of_refused(report.refused)
    warn_of_guarded(report.guarded)
    warn_of_passed_over(report.passed_over, report.unmatched)
    if not report.passed_over:
        warn_of_kept(report.kept)


def warn_of_refused(refused: list[str]) -> None:
    """Name the tensors that no codec can hold; say nothing if there are none."""
    if refused:
        warnings.warn(
            f"stored as they are, not quantized: {'; '.join(refused)}. The checkpoint is complete but larger;"
            " values that are not finite usually mean that training has diverged",
            stacklevel=3,
        )


def warn_of_guarded(guarded: Iterable[Guarded]) -> None:
    """Name the tensors that are stored better because they would lose too much; say nothing if there are none."""
    remedies = {"residual": "stored in 16 bits", "raw": "stored as it is", "none": "stored all the same"}
    named = [f"{each.name} ({each.found}; {remedies[each.remedy]})" for each in guarded]
    if named:
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        warnings.warn(
            "would have lost more than the policy allows: " + "; ".join(named[:NAMED]) + more + ". The checkpoint is"
            " complete but larger; give them another rule (second moments: the codec log), or change the policy's"
            " min_sqnr_db or max_update_direction_error, None for no limit",
            stacklevel=2,
        )


def warn_of_passed_over(paths: list[str], unmatched: list[str]) -> None:
    """Name the tensors that no rule reaches, if that leaves nothing encoded; say nothing if there are none.

    Args:
        paths: The tensors.
        unmatched: Patterns that match nothing of a checkpoint in Lightning's layout; empty for another.
    """
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        remedy = (
            'put the weights under "state_dict" and what optimizers remember under "optimizer_states", as Lightning'
            " does, or pass a CheckpointPolicy with rules for these paths"
        )
        if unmatched:
            remedy = (
                f"nothing in it matches {', '.join(map(repr, unmatched))}; patterns match whole paths, which"
                " `q8lightning inspect` shows, such as 'state_dict.encoder.*' or 'optimizer_states.*.exp_avg'"
            )
        warnings.warn(
            f"nothing of the checkpoint is quantized: no rule of the policy names {', '.join(paths[:3])}{more}. The"
            f" checkpoint is complete but as large as without a policy; {remedy}",
            stacklevel=3,
        )


def warn_of_kept(kept: Iterable[Kept]) -> None:
    """Name the optimizer states that are kept as they are, with the rule to write; one warning for each key."""
    for each in kept:
        named = each.name + (f" and {each.number - 1} more" if each.number > 1 else "")
        remedy = ""
        if each.why == UNKNOWN.why:
            pattern = f'"optimizer_states.*.{each.key}"'
            remedy = (
                f'. Write Rule({pattern}, "softsign", block_size=128) if it is signed, as means of gradients are, or'
                f' "log" in its place if it is never negative and divides the step; Rule({pattern}) keeps it as it is'
                " without a warning"
            )
        warnings.warn(
            f"stored as they are, not quantized: {named} ({each.why}). The checkpoint is complete but larger{remedy}",
            stacklevel=3,
        )


class WarningQueue:
    """Keeps reports of saves until the training thread can warn of them.

    Any thread may complete a report. A warning may be an error, so it must be given where the training hears it, after
    the checkpoint is written or queued. What repeats from save to save is said once.
    """

    def __init__(self) -> None:
        self._reports: deque[SaveReport] = deque()
        self._guarded: set[tuple[str, str]] = set()
        self._passed_over = False
        self._kept: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reports: a copy has saved nothing."""
        return {**self.__dict__, "_reports": deque()}

    def add(self, report: SaveReport) -> None:
        """Add what a save reports, from any thread."""
        self._reports.append(report)

    def warn(self) -> None:
        """Warn of all reports since the last call."""
        while self._reports:
            report = self._reports.popleft()
            warn_of_refused(report.refused)
            new = [each for each in report.guarded if (each.path, each.remedy) not in self._guarded]
            self._guarded |= {(each.path, each.remedy) for each in new}
            warn_of_guarded(new)
            if report.passed_over and not self._passed_over:
                self._passed_over = True
                warn_of_passed_over(report.passed_over, report.unmatched)
            kept = [] if report.passed_over else [each for each in report.kept if each.key not in self._kept]
            self._kept |= {each.key for each in kept}
            warn_of_kept(kept)
