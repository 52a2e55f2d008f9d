"""Save checkpoints of which every process has a part: each encodes and writes its own."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sharded.ranks import Ranks, talking
from q8lightning.checkpoint.sharded.write.local_shards import local_shards
from q8lightning.checkpoint.sharded.write.save import ShardedSave
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlan, ShardPlanner, agree
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.system.paths import PathLike
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO


class ShardSaver:
    """Saves the checkpoints of one strategy in shards; made and called in all processes.

    Args:
        io: What encodes, and writes in the background.
    """

    def __init__(self, io: QuantizedCheckpointIO) -> None:
        self.io = io
        self.ranks = Ranks.of_all()
        """The processes, for the thread that trains."""
        self._writers = Ranks.of_all()  # for the thread that writes
        self._last: ShardPlan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the processes: Trainers are pickled."""
        return {**self.__dict__, "ranks": Ranks(), "_writers": Ranks(), "_last": None}

    def save(
        self,
        path: PathLike,
        checkpoint: Mapping[str, Any],
        state: dict[str, Any],
        planner: ShardPlanner,
        names: Callable[[], ModelNames],
        sections: Sequence[str] = (STATE_DICT, OPTIMIZER_STATES),
    ) -> None:
        """Save a checkpoint to the folder ``path``.

        Args:
            path: The folder.
            checkpoint: What this process has of it.
            state: The same as torch.distributed.checkpoint is given it: only what is sharded.
            planner: Knows how that is named in the checkpoint.
            names: Returns what is known of the model.
            sections: Keys of the checkpoint with what is sharded.

        Raises:
            BackgroundSaveError: In all processes, if an earlier save in the background failed.
        """
        ranks = self.ranks
        with talking():
            target = ranks.at_first(lambda: os.path.abspath(path))
            plan = self._last = agree(planner, state, ranks, self._last)
            part, known = ranks.together(
                lambda: (local_shards(checkpoint, plan, planner, ranks.is_first), names()),
            )

        def write(save: Save, memory: HostMemory) -> SaveReport:
            return ShardedSave(save, plan, part.places, self._writers, sections).write(target, memory)

        self.io.save_shards(part.checkpoint, part.shards, path, known, ranks, write)
