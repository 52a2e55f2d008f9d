"""Start saves: plan once, and encode once for all saves of one pause of training."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from q8lightning.checkpoint.encode.outline import outline_to_plan
from q8lightning.checkpoint.encode.plan import Plan
from q8lightning.checkpoint.encode.planner import plan_save
from q8lightning.checkpoint.encode.run import Run
from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.encode.select.leaves import WHOLE, Shard
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.policy import CheckpointPolicy
from q8lightning.checkpoint.staging.transfer import HostMemory


class SaveStarter:
    """Starts the saves of one training.

    It keeps the plan for as long as checkpoints look alike, and the run of the last save until training goes on.
    A copy has neither.
    """

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._plan: Plan | None = None
        self._run: Run | None = None
        self._pause: Hashable = None

    def __reduce__(self) -> tuple[Any, ...]:
        return SaveStarter, ()

    def start(
        self,
        checkpoint: Mapping[str, Any],
        policy: CheckpointPolicy,
        names: ModelNames,
        pause: Hashable,
        live: bool,
        stand_ins: bool,
        wait_for_room: Callable[[], object],
        shards: Mapping[int, Shard] = WHOLE,
    ) -> Save:
        """Encode or copy what training may change; return the save, whose content can be fetched at any time.

        Args:
            checkpoint: What is saved; left as it is.
            policy: Says what is encoded, and how.
            names: What is known of the model.
            pause: Equal for saves between which nothing changes the tensors; None if that is not known.
            live: Training goes on before the save is fetched.
            stand_ins: See :class:`~q8lightning.checkpoint.staging.copier.Copier`.
            wait_for_room: Called before anything is encoded, to wait until there is memory for it.
            shards: What tensors are a part of, by their ids.
        """
        if type(checkpoint) is not dict:
            checkpoint = dict(checkpoint)
        part, outline, tensors = outline_to_plan(checkpoint)
        plan = self._plan
        if plan is None or not plan.fits(checkpoint, outline, policy, names):
            plan = self._plan = plan_save(part, outline, tensors, policy, names, shards)
        run = self._run
        if run is None or pause is None or pause != self._pause or not run.is_of(plan, tensors, live):
            self._run = None
            wait_for_room()
            run = Run(plan, tensors, live, self._memory)
        self._run, self._pause = run, pause
        return Save(run, checkpoint, tensors, names, live, stand_ins)

    def learn(self, save: Save) -> None:
        """Let later saves run the plan that a fetched save made for them."""
        if self._plan is save.plan:
            self._plan = save.next_plan

    @property
    def is_waited_for(self) -> bool:
        """Whether the last save was in a known pause, whose end :meth:`let_go` will tell."""
        return self._pause is not None

    def let_go(self) -> None:
        """Wait until training may change the tensors that were saved last."""
        run, self._run, self._pause = self._run, None, None
        if run is not None:
            run.let_go()

    def release(self) -> None:
        """Forget the plan and give memory back."""
        self._plan = self._run = None
        self._memory.release()
